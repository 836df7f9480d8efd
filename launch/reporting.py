"""Reports: of one run again, of any runs side by side, of a sweep."""

from pathlib import Path

from finllm.errors import RecipeError, RunError
from finllm.run import find
from finllm.sweeps import FILE, Sweep, write_report
from launch.endings import DONE
from launch.tables import show


def report(*, names: list[str], sweep: str | None, out: Path | None, runs: Path) -> int:
    """Write the report of a run again, compare several, or rank the cells of a sweep."""
    if (sweep is None) == (not names) or (sweep is not None and out is not None):
        raise RecipeError("report: name one run, several to compare them, or --sweep SWEEP; --out goes with several")
    if sweep is not None:
        _say(write_report(_sweep(sweep, runs)))
        return DONE
    from finllm import comparison, report

    chosen = [find(name, runs) for name in names]
    if len(chosen) == 1 and out is None:
        _say(comparison.again(chosen[0]))
        return DONE
    comparison.refuse_unevaluated(chosen)
    path, scores = comparison.write(chosen, out or comparison.default_folder(chosen))
    show(report.table(scores))
    _say(path)
    return DONE


def _sweep(name: str, runs: Path) -> Sweep:
    """The sweep of that name, or in the folder of that path."""
    folder = next((folder for folder in (runs / name, Path(name)) if (folder / FILE).is_file()), None)
    if folder is None:
        known = ", ".join(sorted(path.parent.name for path in runs.glob(f"*/{FILE}"))) or "none yet"
        raise RunError(f"no sweep {name!r} in {runs.absolute()}; there are: {known}")
    return Sweep.of(folder)


def _say(path: Path) -> None:
    print(f"report   {path}\n         {path.with_suffix('.html')}")
