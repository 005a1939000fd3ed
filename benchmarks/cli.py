"""The command line: ``python -m benchmarks COMMAND``."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import lowformer

from . import ceilings, compare, gpu, plans, publish, render, report, rows, runner
from .experiments import EXPERIMENTS, FULL, TINY
from .experiments import QUICK as QUICK_SCALE
from .plans import Choice, Item
from .plots import pictures
from .provenance import ROOT
from .subjects import Layer, layers_of
from .timing import QUICK, SMOKE, Effort

DEFAULT_OUT = ROOT / "bench-out"
QUICK_S = {"ops": 200.0, "models": 340.0}
"""Seconds that the two parts of ``all --quick`` get, out of ten minutes."""
DTYPES = {short: getattr(torch, name) for name, short in rows.SHORT_DTYPES.items() if short != "fp64"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure this library against its rivals.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    for name, text in (
        ("ops", "Operators on the layers of real models."),
        ("models", "Whole models."),
        ("all", "Operators and models, each in a process of its own."),
    ):
        command = add(name, text)
        _common(command)
        amount = command.add_mutually_exclusive_group()
        amount.add_argument("--quick", action="store_true", help="the most important subjects; `all --quick` takes ten minutes")
        amount.add_argument("--smoke", action="store_true", help="tiny subjects, to see that everything runs")
        command.add_argument("--seconds", type=float, help="time limit; what does not fit is named in the results")
        if name != "all":
            _choice(command)
        else:
            command.add_argument("--add", action="store_true", help="then do what `python -m benchmarks add` does")
        command.add_argument("--contenders", metavar="REGEX", help="which take part, besides eager")

    command = add("gpu", "Everything that matters on a GPU, within nine minutes.")
    command.add_argument("--out", type=Path, required=True, help="folder for the results, at most eight files")
    command.add_argument("--add", action="store_true", help="then do what `python -m benchmarks add` does")
    command.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    command.add_argument("--smoke", action="store_true", help="tiny subjects; with --device cpu a rehearsal without a GPU")

    command = add("compare", "Build two commits and alternate them; says what moved by more than the noise.")
    command.add_argument("a", help="a commit, or . for the working tree")
    command.add_argument("b", help="a commit, or . for the working tree")
    _common(command)
    _choice(command)
    command.add_argument("--ops", action="store_true", help="operators too, not only models")
    command.add_argument("--rounds", type=int, default=15, help="undisturbed rounds wanted of every subject")

    command = add("render", "Write the tables of committed results into README.md and docs/benchmarks.md.")
    command.add_argument("--check", action="store_true", help="change nothing; fail if a document is out of date")
    command.add_argument("--results", type=Path, help="print a report of this folder instead")

    command = add("experiment", "An experiment of the papers behind this library: rows, and a table of them.")
    command.add_argument("names", nargs="+", choices=[*EXPERIMENTS, "all"], metavar="NAME", help=f"{', '.join(EXPERIMENTS)} or all")
    _common(command)
    amount = command.add_mutually_exclusive_group()
    amount.add_argument("--quick", action="store_true", help="a smaller grid: each experiment takes a CPU about two minutes")
    amount.add_argument("--smoke", action="store_true", help="tiny subjects, to see that everything runs")
    command.add_argument("--seconds", type=float, help="time limit of each experiment; what does not fit is named in the results")

    command = add("plot", "Draw the pictures of committed results for the documents.")
    command.add_argument("--results", type=Path, default=render.RESULTS, help="folder with a folder of results for each device")
    command.add_argument("--out", type=Path, default=pictures.PICTURES, help="folder for the SVG files, default %(default)s")
    command.add_argument("--check", action="store_true", help="change nothing; fail if a picture is out of date")

    command = add("report", "Make one HTML page of a folder of results.")
    command.add_argument("results", type=Path, metavar="DIR", help="folder with the results files of one device")
    command.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in that folder")

    command = add("add", "Put results into benchmarks/results, and their numbers into the documents.")
    command.add_argument("results", type=Path, metavar="DIR", help="folder that --out named")

    add("check", "Say whether committed results are fit to be published.")

    command = add("ceilings", "Measure the rates that results are held against.")
    _common(command)

    command = commands.add_parser("stage")
    command.add_argument("name", choices=[s.name for s in gpu.STAGES])
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--seconds", type=float, required=True)
    command.add_argument("--device", choices=("cuda", "cpu"), required=True)
    command.add_argument("--smoke", action="store_true")
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--threads", type=int, help="of PyTorch and every CPU contender; default: all cores")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for the results, default %(default)s")


def _choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=lowformer.list_models(), metavar="NAME")
    parser.add_argument("--layers", metavar="REGEX", help="layers whose name this finds")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="PIXELS")
    parser.add_argument("--batches", nargs="+", type=int, metavar="IMAGES")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), metavar="DTYPE")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    args = _parser().parse_args(argv)
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    if getattr(args, "device", "cpu") is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if getattr(args, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        print(
            f"python -m benchmarks {args.command}: there is no CUDA GPU here (torch {torch.__version__}). "
            "`python -m benchmarks gpu --device cpu --smoke --out DIR` rehearses the run without one; "
            "`python -m benchmarks all --quick --out DIR` measures the CPU.",
            file=sys.stderr,
        )
        return 2
    return {
        "ops": _measure,
        "models": _measure,
        "all": _all,
        "gpu": _gpu,
        "compare": _compare,
        "render": _render,
        "report": _report,
        "add": _add,
        "check": _check,
        "ceilings": _ceilings,
        "experiment": _experiment,
        "plot": _plot,
        "stage": _stage,
    }[args.command](args)


def _chosen(args: argparse.Namespace) -> Choice:
    dtypes = [DTYPES[d] for d in args.dtypes] if args.dtypes else None
    return Choice(args.models, args.layers, args.sizes, args.batches, dtypes)


def _items(args: argparse.Namespace) -> list[Item]:
    ops = args.command == "ops"
    if args.smoke:
        return list(plans.smoke_ops(args.device) if ops else plans.smoke_models(args.device))
    if args.quick:
        return list(plans.quick_ops(args.device) if ops else plans.quick_models(args.device))
    return list((plans.full_ops if ops else plans.full_models)(args.device, _chosen(args)))


def _effort(args: argparse.Namespace) -> Effort:
    return SMOKE if args.smoke else QUICK if args.quick else Effort()


def _measure(args: argparse.Namespace) -> int:
    time_left = runner.deadline(args.seconds)
    if (args.quick or args.smoke) and _chosen(args) != Choice():
        print("--quick and --smoke have plans of their own; leave them out to choose subjects", file=sys.stderr)
        return 2
    items = plans.only(_items(args), args.contenders)
    if not items:
        print("no layer has such a name", file=sys.stderr)
        return 2
    session = runner.session_for(args.device, _effort(args), time_left)
    path = runner.results_file(args.out, args.command, plans.dtypes_of(items), session)
    runner.run_items(items, session, path, small=args.smoke, say=_say)
    runner.finish(path)
    print(render.report(rows.read(path)))
    print(f"written to {path}")
    return 0


def _say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


def _all(args: argparse.Namespace) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / gpu.LOG
    total = args.seconds or (sum(QUICK_S.values()) if args.quick else None)
    ends = runner.deadline(None if total is None else total + 30)
    status = 0
    spare = 0.0
    for suite, share in QUICK_S.items():
        command = [sys.executable, "-m", "benchmarks", suite, "--out", str(args.out.resolve()), "--device", args.device]
        command += [flag for flag, given in (("--quick", args.quick), ("--smoke", args.smoke)) if given]
        command += ["--contenders", args.contenders] if args.contenders else []
        command += ["--threads", str(args.threads)] if args.threads else []
        limit = ends()
        if total is not None:
            seconds = share * total / sum(QUICK_S.values()) + spare
            command += ["--seconds", f"{seconds:.0f}"]
            limit = min(limit, seconds + 30)
        _say(f"{suite}: its output goes to {log}")
        left = ends()
        ended = gpu.launch(command, limit, log)
        if total is not None:
            spare = max(0.0, seconds - (left - ends()))
        if ended != 0:
            status = 1
            _say(f"{suite}: {'ran out of time' if ended is None else f'exit status {ended}'}; see {log}")
    for path in args.out.glob("*.jsonl"):
        runner.finish(path)
    report = gpu.write_report(args.out, {})
    print(report.read_text())
    print(f"written to {args.out}")
    return status or _add_if_wanted(args)


def _gpu(args: argparse.Namespace) -> int:
    total = 100.0 if args.smoke else gpu.TOTAL_S
    outcome = gpu.run_stages(args.out, args.device, smoke=args.smoke, total_s=total, say=_say)
    for path in args.out.glob("*.jsonl"):
        runner.finish(path)
    print((args.out / gpu.REPORT).read_text())
    failed = not all(what in ("done", "out of time", "no time left") for what in outcome.values())
    return 1 if failed else _add_if_wanted(args)


def _add_if_wanted(args: argparse.Namespace) -> int:
    if not args.add:
        return 0
    args.results = args.out
    return _add(args)


def _compare(args: argparse.Namespace) -> int:
    short = {v: k for k, v in rows.SHORT_DTYPES.items()}
    dtypes = [short[d] for d in args.dtypes] if args.dtypes else ["float32" if args.device == "cpu" else "float16"]
    sizes, batches = args.sizes or [224], args.batches or [1, 16]
    models = args.models or [plans.MAIN_MODEL]
    subjects: list[tuple[Layer | str, int]] = [(m, size) for size in sizes for m in models]
    if args.ops or args.layers:
        layers = list(dict.fromkeys(x for size in sizes for m in models for x in layers_of(m, size)))
        subjects += [(x, x.height) for x in layers if re.search(args.layers or "", x.name)]
    tasks = [
        compare.task_of(what, size, batch, dtype, args.device) for what, size in subjects for batch in batches for dtype in dtypes
    ]
    effort = Effort(rounds=args.rounds)
    try:
        found = compare.compare(args.a, args.b, tasks, effort, torch.get_num_threads(), _say)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    text = compare.report(args.a, args.b, found)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "compare.md").write_text(text)
    print(text)
    return 1 if any(isinstance(v, str) for _, v in found) else 0


def _render(args: argparse.Namespace) -> int:
    if args.results is not None:
        paths = sorted(args.results.glob("*.jsonl"))
        if not paths:
            print(f"no results in {args.results}", file=sys.stderr)
            return 2
        print(render.report(rows.read(*paths)))
        return 0
    stale = render.render(check=args.check)
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is out of date' if args.check else 'written'}")
    return 1 if stale and args.check else 0


def _report(args: argparse.Namespace) -> int:
    paths = sorted(args.results.glob("*.jsonl"))
    if not paths:
        devices = ", ".join(sorted({str(path.parent) for path in args.results.glob("*/*.jsonl")}))
        print(f"no results (*.jsonl) in {args.results}" + (f"; there are some in {devices}" if devices else ""), file=sys.stderr)
        return 2
    out: Path = args.out or args.results / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(report.page(rows.read(*paths)), encoding="utf-8")
    print(f"written to {out}")
    return 0


def _add(args: argparse.Namespace) -> int:
    try:
        copies = publish.add(args.results, render.RESULTS)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        drawn = pictures.write(render.RESULTS, pictures.PICTURES)
    except ModuleNotFoundError as error:
        print(f"The pictures stay as they are: {error}", file=sys.stderr)
        drawn = []
    changed = [*copies, *drawn, *render.render()]
    for path in changed:
        print(f"{path.relative_to(ROOT)} written")
    return 0


def _check(args: argparse.Namespace) -> int:
    problems = publish.check(render.RESULTS)
    problems += [
        f"{path.relative_to(ROOT)} is out of date: run `python -m benchmarks render`" for path in render.render(check=True)
    ]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def _experiment(args: argparse.Namespace) -> int:
    scale = TINY if args.smoke else QUICK_SCALE if args.quick else FULL
    names = list(EXPERIMENTS) if "all" in args.names else args.names
    for name in names:
        experiment = EXPERIMENTS[name]
        _say(experiment.title)
        path = experiment.run(args.device, args.out, scale, args.seconds, _say)
        print(f"## {experiment.title}\n\n{experiment.report(rows.read(path).experiments[name])}\n\nwritten to {path}\n")
    return 0


def _plot(args: argparse.Namespace) -> int:
    try:
        changed = pictures.write(args.results, args.out, check=args.check)
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    for path in changed:
        print(f"{path} {'is out of date' if args.check else 'written'}")
    return 1 if changed and args.check else 0


def _ceilings(args: argparse.Namespace) -> int:
    clock = runner.clock_for(args.device)
    for dtype in plans.DTYPES[args.device]:
        found = ceilings.measure(args.device, dtype, clock, QUICK)
        print(
            f"{dtype}: {render.number(found.flops_per_s / 1e12)} TFLOP/s ({found.product}), "
            f"copy {render.number(found.bytes_per_s / 1e9)} GB/s"
        )
    return 0


def _stage(args: argparse.Namespace) -> int:
    gpu.run_stage(args.name, args.out, args.seconds, args.device, args.smoke)
    return 0
