"""What a person sees of pairs of answers before anything is learnt from them."""

import random
from collections import Counter
from collections.abc import Sequence

from finllm.data.parts import Parts
from finllm.data.preferences import Preference
from finllm.learnt import learnt
from finllm.methods import Dpo
from finllm.recipe import Recipe

EXAMPLES = 10
SEED = 0
LONGEST = 110
"""Characters of a text in one line."""


def told(recipe: Recipe, parts: Parts) -> list[str]:
    """Counts of a recipe's pairs, and ten of them; nothing where it learns from no pairs."""
    if not isinstance(recipe.train, Dpo):
        return []
    return lines([item for item in learnt(recipe, parts) if isinstance(item, Preference)])


def lines(pairs: Sequence[Preference]) -> list[str]:
    """How many pairs of which kind, and ten drawn with a fixed seed."""
    kinds = Counter((pair.source, _short(pair.chosen, 24), _short(pair.rejected, 24)) for pair in pairs)
    bands = Counter(pair.agreement for pair in pairs if pair.agreement is not None)
    drawn = random.Random(SEED).sample(list(pairs), min(EXAMPLES, len(pairs)))  # noqa: S311 - a fixed draw, no secret
    found = [f"{len(pairs)} pairs of answers, the better one first"]
    found += [
        f"  {count:5}  {source}: {better} over {worse}" for (source, better, worse), count in kinds.most_common(12)
    ]
    if len(kinds) > 12:
        found.append(f"         and {len(kinds) - 12} other kinds")
    found += [f"  {count:5}  agreement {band}" for band, count in sorted(bands.items(), reverse=True)]
    found += [
        f"  {pair.id}: {_short(pair.answers[0], 60)} over {_short(pair.answers[1], 60)}: {_short(pair.text)}"
        for pair in drawn
    ]
    return found


def _short(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
