"""Our own 620 sentences, shipped with the package: newswire, filings, analyst notes and posts on invented companies."""

import json
from pathlib import Path
from typing import Literal

from finllm.data.spec import DatasetSpec
from finllm.example import Example

FILE = Path(__file__).with_name("sample.jsonl")


class Sample(DatasetSpec):
    """The shipped sentences, a third of them with mixed signals ("sales missed but guidance rose")."""

    name: Literal["sample"]
    kind: Literal["all", "plain", "mixed"] = "all"
    """mixed are those where a careless reader answers wrongly; plain are the others."""

    def read(self) -> list[Example]:
        """Every sentence of the kind asked for; the split stands in the file."""
        rows = [json.loads(line) for line in FILE.read_text("utf-8").splitlines()]
        return [
            Example(
                id=f"{self.title}:{row['id']}",
                dataset=self.title,
                text=row["text"],
                label=row["label"],
                split=row["split"],
                source=row["source"],
                careless=row.get("careless"),
                explanation=row.get("explanation"),
            )
            for row in rows
            if self.kind == "all" or (self.kind == "mixed") == ("careless" in row)
        ]
