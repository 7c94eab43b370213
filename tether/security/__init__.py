"""Keys, certificates and identity: what proves who somebody is."""
