"""`python -m loadtest.chaos SCENARIO…`: kill, move, deploy and shrink while people talk, and see whether they notice.

python -m loadtest.chaos engine --sessions 8 --seconds 60
python -m loadtest.chaos all --json
python -m loadtest.chaos drain deploy --sessions 3 --seed 7 --reference /tmp/quiet.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from loadtest.chaos.call_verdict import Reference
from loadtest.chaos.plan import CUTS_SOCKETS, SCENARIOS, STRIKES, kinds, strike_times_s
from loadtest.chaos.run import Conversations, Order, load, save, struck, undisturbed, write_log
from loadtest.chaos.system import Layout, System, SystemBroken
from loadtest.chaos.verdict import Verdict

FAILED, WRONG_USE, INVALID, NOT_RUN = 1, 2, 3, 4

EPILOG = """\
Three fake nodes with an accelerator each, a head, and the server on them are started for every scenario, and calls go
through the public WebSocket. Kept: the call went on to its end. Lost and doubled: model frames, by their numbers, in
the journal and at the ear. Tokens: equal to those of a run that nobody disturbed. Gap: the longest that a caller
heard nothing. Exit status: 0 all of it held; 1 something did not; 3 nothing is certain, because this process was
asleep itself for too long: run it again on a machine with less to do; 4 the system did not start."""


@dataclass(frozen=True)
class Keep:
    """Where the undisturbed run is kept for later, and what the callers of the others saw."""

    reference: Path | None
    log: Path | None


def main() -> int:
    arguments = _parser().parse_args()
    order = Order(arguments.sessions, arguments.seconds, arguments.seed, arguments.strikes)
    scenarios = list(SCENARIOS) if "all" in arguments.scenario else arguments.scenario
    layout = Layout(arguments.nodes, context=arguments.context, codec_context=arguments.codec_context)
    try:
        for scenario in scenarios:
            kinds(scenario)
        strike_times_s(order.seconds, order.seed, layout.windows, order.strikes)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_USE
    try:
        known = load(arguments.reference, order) if arguments.reference and arguments.reference.is_file() else ([], 0.0)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_USE
    try:
        verdicts = asyncio.run(
            run_all(scenarios, order, layout, known, Keep(arguments.reference, arguments.log), arguments.json)
        )
    except SystemBroken as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT_RUN
    outcomes = {verdict.outcome for verdict in verdicts}
    return FAILED if "failed" in outcomes else INVALID if "invalid" in outcomes else 0


async def run_all(
    scenarios: list[str],
    order: Order,
    layout: Layout,
    known: tuple[list[Reference], float],
    keep: Keep,
    as_json: bool,
) -> list[Verdict]:
    """Each scenario on a system of its own. The undisturbed run is made once, unless it is `known`. Raises
    SystemBroken."""
    verdicts: list[Verdict] = []
    references, quiet_gap_s = known
    for scenario in scenarios:
        say(f"starting {layout.nodes} nodes for {scenario}")
        async with System.running(_layout(layout, scenario, order)) as system:
            if not references:
                quiet = await undisturbed(system, order, say)
                _check(quiet, order)
                references, quiet_gap_s = _references(quiet), quiet.longest_gap_s
                if keep.reference is not None:
                    save(keep.reference, quiet)
            verdict, conversations = await struck(system, scenario, order, references, quiet_gap_s, say)
        verdicts.append(verdict)
        if keep.log is not None:
            write_log(keep.log / f"{scenario}.json", conversations)
        if as_json:
            print(json.dumps(verdict.as_json()), flush=True)
        else:
            show(verdict)
    return verdicts


def _layout(layout: Layout, scenario: str, order: Order) -> Layout:
    """A second ingress where the first may die: with one, everybody would wait for Serve to start another. Where an
    unmodified client talks beside the others there is one slot for it, and no other: what it had is to be free."""
    found = {*kinds(scenario)}
    if not found & {*CUTS_SOCKETS}:
        return layout
    settings = layout.settings
    if "ingress" in found:
        settings += (("RESERVE_SLOTS", str(max(0, layout.nodes * layout.slots - order.sessions - 1))),)
    return replace(layout, ingresses=2, settings=settings)


def _references(quiet: Conversations) -> list[Reference]:
    return [Reference.of(log, seen) for log, seen in zip(quiet.logs, quiet.seen, strict=True)]


def _check(quiet: Conversations, order: Order) -> None:
    """A reference with a hole would hide the same hole in what is held against it."""
    for log, seen in zip(quiet.logs, quiet.seen, strict=True):
        if log.failure is not None:
            raise SystemBroken(f"call {log.call} failed although nobody disturbed it: {log.failure}")
        if len(seen.tokens) < order.frames:
            raise SystemBroken(
                f"the journal of call {log.call} showed {len(seen.tokens)} of {order.frames} frames although nobody "
                f"disturbed it ({seen.trouble or 'no trouble'})"
            )


def show(verdict: Verdict) -> None:
    number = len(verdict.calls)
    print(f"{verdict.scenario}: {verdict.outcome.upper()}")
    for strike in verdict.strikes:
        print(f"  struck at {strike}")
    print(f"  conversations kept   {verdict.kept} of {number}")
    print(f"  model frames lost    {verdict.lost}")
    print(f"  model frames doubled {verdict.doubled}")
    print(f"  tokens equal         {verdict.tokens_equal} of {number}")
    print(
        f"  longest gap heard    {verdict.longest_gap_s:.2f} s (allowed {verdict.gap_limit_s:g}; "
        f"undisturbed {verdict.undisturbed_gap_s:.2f}; this process itself late by {verdict.witness_lag_ms:.0f} ms "
        f"at p99, asleep for {verdict.witness_asleep_s:.2f} s at most)"
    )
    for call in verdict.calls:
        told = [f"gap {call.longest_gap_s:.2f} s at {call.gap_at_s:.1f} s ({call.gap_story})", f"{call.homes} homes"]
        told += [f"cut: {'; '.join(call.cuts)}"] * bool(call.cuts) + [f"{call.trimmed} trimmed"] * bool(call.trimmed)
        told += [f"{call.sound_differs} sound otherwise"] * bool(call.sound_differs)
        told += [f"lost {call.lost}"] * bool(call.lost) + [f"doubled {call.doubled}"] * bool(call.doubled)
        told += [f"unseen {call.unseen}"] * bool(call.unseen)
        told += [f"tokens differ from frame {call.differing}"] * (call.differing is not None)
        told += ["text differs"] * (not call.text_equal) + [call.why] * bool(call.why)
        print(f"    call {call.call}: {'; '.join(told)}")
    for redial in verdict.redials or ():
        print(f"    an unmodified client {redial}")
    for fault in verdict.faults:
        print(f"  ! {fault}")
    for doubt in verdict.doubts:
        print(f"  ? {doubt}")
    sys.stdout.flush()


def say(what: str) -> None:
    """Progress, on stderr."""
    print(what, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.chaos",
        description="Strike the system while people talk, and see whether they notice.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    several = "; all: each of them in turn; engine+drain: several by turns in one run"
    parser.add_argument("scenario", nargs="+", metavar="SCENARIO", help=", ".join(SCENARIOS) + several)
    parser.add_argument("--sessions", type=int, default=8, help="conversations at once (default 8)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each lasts (default 60)")
    parser.add_argument("--nodes", type=int, default=3, help="fake nodes with an accelerator each (default 3)")
    parser.add_argument("--strikes", type=int, default=STRIKES, help="how often to strike (default 3)")
    parser.add_argument("--seed", type=int, default=1, help="of the strikes' times and victims")
    parser.add_argument("--context", type=int, default=200, help="frames the model remembers (default 200, 16 s)")
    parser.add_argument("--codec-context", type=int, default=50, help="40 ms positions a codec layer remembers")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="keep the undisturbed run here, or take it")
    parser.add_argument("--log", type=Path, metavar="FOLDER", help="write down all that the callers saw")
    parser.add_argument("--json", action="store_true", help="one JSON object for each scenario, and nothing else")
    return parser


if __name__ == "__main__":
    sys.exit(main())
