"""Pictures of results. They are drawn from rows alone: nothing is measured here, and what a computation costs is counted.

:data:`PLOTS` has every picture; :func:`figures` draws those that results have the rows for.

    for picture, figure in figures(rows.read(*paths)):
        page += f"<figure>{svg(figure, 'css')}<figcaption>{picture.about}</figcaption></figure>"
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..rows import Results
from .style import sheet, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PLOTS", "Missing", "Picture", "ceilings", "figures", "source", "svg"]


class Missing(ValueError):
    """The results have no rows for a picture; the message says which."""


@dataclass(frozen=True)
class Picture:
    """One kind of picture.

    Attributes:
        name: of its module here, and of its files.
        title: in a few words.
        about: what is to be seen in it: its caption, and its text for those who do not see it.
        experiment: the experiment whose rows it is drawn from; None for the rows of ``models`` and ``ops``.
    """

    name: str
    title: str
    about: str
    experiment: str | None = None

    def part(self, results: Results) -> Results:
        """What it is drawn from, of all the results of a device; nothing, where the experiment was not run."""
        return results if self.experiment is None else results.experiments.get(self.experiment, Results())

    def __call__(self, results: Results) -> Figure:
        """Draw it.

        Args:
            results: what :meth:`part` gives.

        Raises:
            Missing: the rows that it needs are not there.
            ModuleNotFoundError: matplotlib is not installed.
        """
        with sheet():
            draw: Callable[[Results], Figure] = importlib.import_module(f"{__name__}.{self.name}").draw
            figure = draw(results)
            # Laid out once and for all: every form of the picture then has everything in the same place.
            figure.draw_without_rendering()
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            return figure


PLOTS: dict[str, Picture] = {
    p.name: p
    for p in (
        Picture(
            "waterline",
            "Waterline",
            "The rate that each kernel of the model could reach, limited by arithmetic or by memory traffic: one by one above, "
            "a block at a time below. Widths are shares of the operations; the blue level is the rate of the whole sequence. "
            "Lines across bars are what was measured.",
        ),
        Picture(
            "gap",
            "Efficiency gap",
            "Accuracy against latency. Each model stands where its operations would take it at the device's peak rate, and where "
            "it was measured; the shorter the segment between the two, the better the device is used.",
        ),
        Picture(
            "layers",
            "Speed-up of every layer",
            "For each layer of the model, how many times longer every rival takes than this library. "
            "To the left of the line marked lowkernels, the rival is faster.",
        ),
        Picture(
            "protocol",
            "Throughput and latency by the papers' protocol",
            "Every variant: latency of one image on the left, throughput at batch 200 on the right, for plain PyTorch, TorchScript "
            "and this library.",
            "protocol",
        ),
        Picture(
            "resolution",
            "Latency against resolution",
            "Latency of one image against its size, with Lowtention's downsampling (solid) and with attention at full resolution "
            "(dashed).",
            "resolution",
        ),
        Picture(
            "fusing",
            "Dense or depthwise",
            "Above, time against multiply-accumulates of blocks with a dense and with a depthwise convolution, as PyTorch runs "
            "them and as this library does. Below, how many times longer the depthwise one takes, against channels.",
            "fusing",
        ),
        Picture(
            "pixels",
            "The same pixels at lower resolution",
            "Time per megapixel when the same number of pixels comes as few large or as many small images.",
            "pixels",
        ),
        Picture(
            "sharing",
            "Several processes on one device",
            "Images per second of all processes together, and the latency in each, against the number of processes.",
            "sharing",
        ),
    )
}


def source(results: Results) -> str:
    """Where the rows come from, in a line."""
    run = results.run
    device = f"{run['device_name']}, {run['threads']} threads" if run["device"] == "cpu" else str(run["device_name"])
    commit = run.get("commit")
    state = "no checkout" if commit is None else f"commit {commit[:12]}" + (", changed" if run.get("dirty") else "")
    return f"{device} · PyTorch {run['versions']['torch']} · {run['date'][:10]} · {state}"


def ceilings(results: Results, dtype: str) -> tuple[float, float]:
    """The most operations and bytes a second that a run reached in this dtype.

    Raises:
        Missing: they were not measured, or something else had the machine meanwhile.
    """
    found = [c for c in results.ceilings if c["dtype"] == dtype and not c.get("disturbed")]
    if not found:
        raise Missing(f"the device's rates in {dtype} were not measured undisturbed")
    return 1e12 * max(c["tflops"] for c in found), 1e9 * max(c["gb_per_s"] for c in found)


def figures(results: Results) -> Iterator[tuple[Picture, Figure]]:
    """Every picture that the results of a device, its experiments included, have the rows for."""
    for picture in PLOTS.values():
        try:
            figure = picture(picture.part(results))
        except Missing:
            continue
        yield picture, figure
