"""What becomes of a request at the workers: it is sent, sent to another where that is safe and of use, and the first good answer wins.

A request that may have run is sent again only if its model is pure, and only as often as the version's retry budget allows; one that no
worker saw costs nobody anything and goes on as it is.  A pure one is also sent to a second worker when the first falls silent, or when it
takes longer than most (`ServingSettings.hedge`), or when the model raised, since that may be this copy's fault: what two copies fail, the
input is to blame for, and no route suffers for it.
"""

from __future__ import annotations

import asyncio
import time
from typing import Literal, Protocol

from tether.errors import TetherError, WorkerLostError
from tether.gateway.calls import Attempt, Call, verdict_of
from tether.gateway.lines import Lines
from tether.gateway.suspicion import TELLING, Suspicion
from tether.ports import HopReply, Undelivered
from tether.routing.health import SILENCE, Verdict
from tether.routing.tracks import Track
from tether.telemetry.steering_metrics import STEERING
from tether.wire.frames import OK

__all__ = ["Caller", "Tries"]

_LOSSES = 5
"""Workers that may go away with one request before it is given up; after two it runs where it ends none (`suspicion.py`)."""


class Caller(Protocol):
    """Who has the request to be answered."""

    def answer(self, call: Call, reply: HopReply) -> None:
        """This is the answer."""
        ...

    def fail(self, call: Call, error: TetherError) -> None:
        """There is none."""
        ...

    def again(self, call: Call, now: float, *, is_free: bool) -> None:
        """Try it once more: at another worker, or later. `is_free`: it is not one more than the worker had to do."""
        ...


class Tries:
    """Of one gateway."""

    def __init__(self, caller: Caller, lines: Lines, suspicion: Suspicion) -> None:
        self._caller, self._lines, self._suspicion = caller, lines, suspicion

    def send(self, call: Call, track: Track, now: float, *, is_retry: bool = False) -> None:
        """To this worker, whatever is under way already."""
        attempt = Attempt(call, track, now, is_retry=is_retry)
        call.live.append(attempt)
        transport, parts = self._lines.to(track.route.endpoint), call.parts
        if parts is None:
            attempt.abandon = transport.send(call.hop, lambda reply: self._replied(attempt, reply))
        else:
            sent = transport.stream(call.hop, parts.came, lambda reply: self._replied(attempt, reply))
            attempt.abandon = sent.cancel
            parts.sent(sent.taken)

    def hedge_soon(self, call: Call) -> None:
        """Send it to a second worker, too, if it takes long, as far as the version's settings say so."""
        hedging = call.traffic.steering.hedging if call.traffic is not None else None
        if hedging is not None and call.may_run_again:
            hedging.began()
            if hedging.after is not None:
                call.hedging = asyncio.get_running_loop().call_later(hedging.after, self._hedge, call)

    def let_go(self, call: Call, now: float) -> None:
        """What is under way is of no use any more."""
        if call.hedging is not None:
            call.hedging.cancel()
        live, call.live = call.live, []
        for attempt in live:
            attempt.abandon()
            track, is_stream = attempt.track, call.parts is not None  # how long that went on was its reader's matter
            if not is_stream:
                track.lasted(now - attempt.sent)
            if call.traffic is None:
                continue
            health = call.traffic.steering.health
            if not is_stream and health.is_silent(track, attempt.sent, now):
                health.fell_silent(track, attempt.sent, now)
            else:
                health.let_go(track, now)

    def look(self, call: Call, now: float) -> None:
        """Whether the worker that has it fell silent; worth a look from `SILENCE` on."""
        if len(call.live) != 1 or call.parts is not None or call.traffic is None:
            return
        attempt, health = call.live[0], call.traffic.steering.health
        if now - attempt.sent > SILENCE and health.is_silent(attempt.track, attempt.sent, now):
            health.fell_silent(attempt.track, attempt.sent, now)
            self.send_elsewhere(call, now)

    def send_elsewhere(self, call: Call, now: float) -> None:
        """To a second worker as well, if that does no harm: the one that has it may never answer."""
        traffic, avoid = call.traffic, [attempt.track for attempt in call.live]
        if traffic is None or not call.may_run_again or not traffic.steering.has_other(avoid) or not traffic.steering.budget.take(now):
            return
        track = traffic.steering.choose(b"", avoid, now)
        if track is not None and track not in avoid:
            _count("retries", call, "silent")
            self.send(call, track, now, is_retry=True)

    def _hedge(self, call: Call) -> None:
        traffic = call.traffic
        if traffic is None or traffic.steering.hedging is None or len(call.live) != 1:
            return
        avoid = [call.live[0].track]
        if not traffic.steering.has_other(avoid) or not traffic.steering.hedging.take():
            return
        now = time.monotonic()
        track = traffic.steering.choose(b"", avoid, now)
        if track is not None and track not in avoid:
            _count("hedges", call, "sent")
            self.send(call, track, now)

    def _replied(self, attempt: Attempt, reply: HopReply | Undelivered) -> None:
        call = attempt.call
        if attempt not in call.live:  # it was let go, and the worker was faster
            return
        now, is_first = time.monotonic(), attempt is call.live[0]
        call.live.remove(attempt)
        if isinstance(reply, HopReply) and reply.status == OK and is_first and not call.hop.alone:  # as nearly all
            self._succeeded(attempt, now)
            self._caller.answer(call, reply)
        elif isinstance(reply, HopReply):
            self._answered(attempt, reply, now, is_first=is_first)
        else:
            self._blame(attempt, now)
            self._undelivered(attempt, reply, now)

    def _answered(self, attempt: Attempt, reply: HopReply, now: float, *, is_first: bool) -> None:
        call = attempt.call
        if call.entry is not None and (reply.status in TELLING or call.hop.alone):
            judged = self._suspicion.judged(call.entry, call.hop, reply)
            if isinstance(judged, Undelivered):  # the model's process ended, and it is not known whose fault that was
                self._heard(attempt, now)
                self._undelivered(attempt, judged, now)
                return
            reply = judged
        if not is_first and call.hedging is not None and reply.status == OK:
            _count("hedges", call, "won")
        self._judge(attempt, reply, now)

    def _judge(self, attempt: Attempt, reply: HopReply, now: float) -> None:
        match verdict_of(reply):
            case Verdict.FINE:
                self._succeeded(attempt, now)
                self._caller.answer(attempt.call, reply)
            case Verdict.NEUTRAL:
                self._heard(attempt, now)
                self._answer_unless_better(attempt.call, reply)
            case Verdict.MODEL:
                self._heard(attempt, now)
                self._doubt(attempt, reply, now)
            case Verdict.BROKEN:
                self._blame(attempt, now)
                self._refer(attempt, reply, now, "broken")

    def _succeeded(self, attempt: Attempt, now: float) -> None:
        call, seconds = attempt.call, now - attempt.sent
        if call.traffic is None:
            return
        steering = call.traffic.steering
        if call.parts is not None:  # how long it took was its reader's matter
            steering.health.flowed(attempt.track, now)
        else:
            steering.health.took(attempt.track, seconds, now)
            if steering.hedging is not None:
                steering.hedging.took(seconds)
        steering.budget.succeeded(is_retry=attempt.is_retry)
        if call.doubted is not None and call.doubted is not attempt.track:
            steering.health.failed(call.doubted, now)

    def _heard(self, attempt: Attempt, now: float) -> None:
        if attempt.call.traffic is not None:
            attempt.call.traffic.steering.health.heard(attempt.track, now)

    def _blame(self, attempt: Attempt, now: float) -> None:
        if attempt.call.traffic is not None:
            attempt.call.traffic.steering.health.failed(attempt.track, now)

    def _doubt(self, attempt: Attempt, reply: HopReply, now: float) -> None:
        """The model raised: is it the input, or this copy?"""
        call = attempt.call
        if call.doubted is not None:
            self._answer_unless_better(call, reply)
            return
        call.doubted, traffic = attempt.track, call.traffic  # this version's: the answer may be taken back, to another one
        if not self._refer(attempt, reply, now, "doubted") and traffic is not None:
            traffic.steering.health.failed(attempt.track, now, by_itself=False)

    def _refer(self, attempt: Attempt, reply: HopReply, now: float, cause: str) -> bool:
        """To another worker, if that may have a better answer; else this is the answer. Whether there is another try."""
        call = attempt.call
        call.avoid.append(attempt.track)
        if call.live:
            call.fallback = reply
            return True
        traffic = call.traffic
        may_try = traffic is not None and call.may_run_again and traffic.steering.has_other(call.avoid)
        if traffic is None or not may_try or not traffic.steering.budget.take(now):
            self._caller.answer(call, reply)
            return False
        call.fallback = reply
        track = traffic.steering.choose(b"", call.avoid, now)
        if track is None:
            self._caller.answer(call, reply)
            return False
        _count("retries", call, cause)
        self.send(call, track, now, is_retry=True)
        return True

    def _answer_unless_better(self, call: Call, reply: HopReply) -> None:
        """A refusal is the answer unless another worker has it as well. What the caller did wrong is wrong everywhere."""
        if reply.status < 500:  # noqa: PLR2004 (the caller's own fault)
            self._caller.answer(call, reply)
        elif call.live:
            call.fallback = call.fallback or reply
        else:
            self._caller.answer(call, call.fallback or reply)

    def _undelivered(self, attempt: Attempt, reason: Undelivered, now: float) -> None:
        call = attempt.call
        call.avoid.append(attempt.track)
        if reason is Undelivered.LOST:
            call.losses += 1
            if call.entry is not None and not self._has_begun(call):
                call.hop = self._suspicion.lost(call.entry, attempt.track.route, call.hop)
        if call.live:
            return
        if call.fallback is not None:
            self._caller.answer(call, call.fallback)
        elif reason is Undelivered.NOT_SENT:
            self._caller.again(call, now, is_free=True)
        else:
            self._lost(call, now)

    def _lost(self, call: Call, now: float) -> None:
        """The worker may have run it: only a pure model is asked again."""
        if self._has_begun(call):
            error = "the worker went away in the middle of the stream: only you know whether to ask again"
        elif call.entry is None or not call.entry.info.pure:
            error = "the worker went away; the model is not pure, so only you know whether to send the request again"
        elif call.losses >= _LOSSES:
            error = f"{call.losses} workers went away while they had this request; try again later"
        else:
            self._caller.again(call, now, is_free=False)
            return
        self._caller.fail(call, WorkerLostError(error))

    def _has_begun(self, call: Call) -> bool:
        return call.parts is not None and call.parts.have_begun


def _count(what: Literal["retries", "hedges"], call: Call, label: str) -> None:
    if call.entry is not None:
        STEERING.count(what, call.entry.model.name, label)
