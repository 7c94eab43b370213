"""Labels that come for answers: told to the orchestrator with what else was seen, and to whoever hears events."""

from dispatch_rig import Doubling, Rig, eventually

from tether.routing.lab_events import Kind


async def test_what_comes_within_a_second_is_told_together(tmp_path):
    rig = Rig(tmp_path)
    try:
        rig.route(Doubling().info)
        entry = rig.dispatch.table.resolve("m")
        for right, wrong in ((90, 3), (3, 4)):
            rig.dispatch.labelled(entry, right, wrong)
        await eventually(lambda: rig.control.loads)
        assert [(load.right, load.wrong, load.answered) for load in rig.control.loads[0].versions.values()] == [(93, 7, 0)]
        told = [event for event in rig.dispatch.events.after(0) if event.kind == Kind.LABELLED]
        assert [(event.model, event.version, event.right, event.wrong) for event in told] == [("m", 1, 93, 7)]
    finally:
        await rig.aclose()
