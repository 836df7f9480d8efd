"""Any data set of the Hugging Face hub, or a local folder of Parquet, CSV or JSON files, read with `datasets`."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from finllm.data.columns import ColumnsSpec, Row
from finllm.errors import DataError
from finllm.example import Example, Split


class Hub(ColumnsSpec):
    """A data set with a text and a label column; where the label has class names, those count."""

    name: Literal["hub"]
    id: str = Field(min_length=1)
    """Such as `zeroshot/twitter-financial-news-sentiment`, or a local folder."""
    config: str | None = None
    """The set's configuration, where it has several."""
    revision: str | None = None
    """Branch, tag or commit; null is the newest."""
    splits: dict[Split, str] | None = Field(default=None, min_length=1)
    """Which of the set's splits is which part, such as `{train: train, test: validation}`.

    null takes the rows of all its splits together, and splits them 70/10/20 by `split_seed`.
    """

    @property
    def twins_grouped(self) -> bool:
        """Our own split keeps near twins in one group; those of the hub may not."""
        return self.splits is None

    def read(self) -> list[Example]:
        """Every row of the wanted splits; raises DataError where the set cannot be had or has other columns."""
        loaded = self._loaded()
        parts: Sequence[tuple[str, Split | None]] = (
            [(name, None) for name in loaded] if self.splits is None else [(n, part) for part, n in self.splits.items()]
        )
        unknown = [name for name, _ in parts if name not in loaded]
        if unknown:
            raise DataError(f"{self.id}: has no split {', '.join(unknown)}; its splits are {', '.join(loaded)}")
        rows = []
        for name, part in parts:
            self.check_columns(f"{self.id}, split {name}", loaded[name].column_names)
            rows += list(_rows(loaded[name].select_columns(self.wanted_columns), name, self.label, part))
        return self.examples(self.id, rows)

    def _loaded(self) -> Any:
        """The set's splits by name."""
        import httpx
        from datasets import load_dataset
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return load_dataset(self.id, self.config, revision=self.revision)
        except (OSError, ValueError, RuntimeError, httpx.HTTPError, HfHubHTTPError) as error:
            first = str(error).split("\n")[0]
            raise DataError(
                f"{self.id}: `datasets` cannot load it: {type(error).__name__}: {first}. Check `id`, `config`, "
                "`revision` and the network (HF_HUB_OFFLINE=1 allows only what is in the cache); a set that needs a "
                "loading script is no longer supported: save it as a file and use `name: table`"
            ) from error


def _rows(data: Any, split: str, label: str, part: Split | None) -> Iterator[Row]:
    from datasets import ClassLabel

    feature = data.features[label]
    names = dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else {}
    for number, values in enumerate(data):
        named = {**values, label: names.get(values[label], values[label])}  # -1 has no name: the label is hidden
        yield Row(f"{split}-{number}", f"row {number} of {split}", named, part)
