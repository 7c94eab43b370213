"""What a host lacks, from elsewhere; and how much of it is kept."""
