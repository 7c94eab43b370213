"""What `explain` says is what placement does."""

from hypothesis import given
from hypothesis import strategies as st

from tether.orchestrator.explaining import Seat, explain
from tether.orchestrator.placement import Candidate, place, surplus


def seat(number=1, bar="", held_back="", **more):
    name = f"worker-{number}"
    return Seat(name, Candidate(f"tls://{name}", **({"loaded": False, "loading": False, "able": True, "models": 0} | more)), bar, held_back)


Seats = st.lists(
    st.builds(
        lambda bar, **more: (bar, more),
        st.sampled_from(["", "", "it has no GPU"]),
        loaded=st.booleans(),
        loading=st.booleans(),
        able=st.booleans(),
        models=st.integers(0, 3),
        lent=st.booleans(),
        has_gpu=st.booleans(),
        roomy=st.booleans(),
        host=st.sampled_from("ab"),
    ),
    max_size=6,
).map(lambda drawn: [seat(number, bar, **more) for number, (bar, more) in enumerate(drawn)])


@given(Seats, st.integers(0, 4), st.booleans())
def test_it_says_of_each_worker_what_placement_does_with_it_and_never_nothing(seats, copies, gives_back):
    lines = explain(seats, copies, gives_back=gives_back)
    fit = [each.candidate for each in seats if not each.bar]
    assert [line.worker for line in lines] == [each.worker for each in seats]
    assert all(line.why for line in lines)
    assert {line.worker for line in lines if line.holding == "asked"} == {address.removeprefix("tls://") for address in place(fit, copies)}
    leaving = surplus(fit, copies) if gives_back else []
    assert {line.worker for line in lines if line.holding == "leaving"} == {address.removeprefix("tls://") for address in leaving}


def whys(*seats, copies=2):
    return [line.why for line in explain(seats, copies, gives_back=True)]


def test_the_reason_names_what_decided():
    here = seat(1, loaded=True, host="a")
    assert whys(here, seat(2, host="b"), seat(3, host="a")) == [
        "it has it in memory",
        "it is on another host than the others",
        "others come first: with a GPU, on another host, or with fewer models",
    ]
    assert whys(seat(1, has_gpu=True), seat(2))[0] == "it has a GPU"
    assert whys(here, seat(2, roomy=False))[1].startswith("there is no room")
    assert whys(here, seat(2, able=False, held_back="bad_model: corrupt"))[1] == "bad_model: corrupt"
    assert whys(here, seat(2, bar="it is in eu, not in us"))[1] == "it is in eu, not in us"
    assert whys(here, seat(2, loaded=True), copies=1)[1] == "1 copy will do, and the others are better placed"
    assert whys(seat(1), copies=0) == ["nobody asks for it"]
