"""The recipe: WHAT to train and evaluate. Every default of a run stands here, and nowhere else."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from finllm import yamlfile
from finllm.data import DataSpec
from finllm.methods import Dpo, Explanations, Sft
from finllm.yamlfile import Spec, listed, named

Quantization = Literal["none", "nf4", "fp4", "int8"]
FOUR_BIT: tuple[Quantization, ...] = ("nf4", "fp4")
Strategy = Literal["single", "ddp", "zero2", "fsdp", "zero3"]
SHARDED: tuple[Strategy, ...] = ("zero2", "fsdp", "zero3")
"""Strategies under which no process holds all that is trained."""
APART: tuple[Strategy, ...] = ("fsdp", "zero3")
"""Strategies under which each process holds a part of the weights."""
BY_DEEPSPEED: tuple[Strategy, ...] = ("zero2", "zero3")
"""Strategies that DeepSpeed carries out; the others are torch's."""


class Model(Spec):
    """The base model, and the form in which its weights are held."""

    name: str = Field(min_length=1)
    """A hub id (`mistralai/Mistral-7B-v0.1`), a local folder, or the embedded `smollm2-135m`."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null is the newest."""
    quantization: Quantization = "none"
    """Weights of the frozen base: 4-bit NormalFloat (QLoRA, arXiv 2305.14314), 4-bit float, LLM.int8(), or none."""
    double_quantization: bool = True
    """Quantise the 4-bit scales too; saves about 0.4 bit a weight."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic, and weights that are not quantised; auto is bf16 on a GPU that has it, fp32 on CPU."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Implementation in Transformers; only `sdpa` lets rows share their prefix."""


class Prompt(Spec):
    """How an example is shown to the model: the same in training, evaluation and prediction."""

    template: Literal["plain", "chat"] = "plain"
    """plain for base models; chat is the tokenizer's own chat template, for instruct models."""
    instruction: str = (
        "Classify the sentiment of the financial text from an investor's point of view: negative, neutral or positive."
    )
    """Stands before every text; name the three labels in it."""
    max_tokens: int = Field(default=512, ge=32)
    """Sequence length. A longer text is cut at its end; instruction and label always stay."""


class Lora(Spec):
    """Low-rank adapters (arXiv 2106.09685), kept in fp32."""

    rank: int = Field(default=16, ge=1)
    """Of the update of each target's weights."""
    alpha: float = Field(default=32, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapters' inputs that is dropped in training; above 0 rows cannot share their prefix."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Module names such as `[q_proj, v_proj]`, or all linear layers but the head."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv 2312.03732)."""

    @model_validator(mode="after")
    def _some_target(self) -> "Lora":
        if not self.targets:
            raise ValueError("targets is empty; name at least one module, such as [q_proj, v_proj]")
        return self


class Evaluation(Spec):
    """Which systems are scored on the test part, and how sure we are of the figures."""

    base: bool = True
    """Score the base model too (adapter off: no second copy in memory)."""
    baselines: tuple[Literal["majority", "tfidf"], ...] = ("majority", "tfidf")
    """majority: the commonest training label; tfidf: TF-IDF and logistic regression on the training part."""
    batch_calibration: bool = True
    """Show the base also without its preference for a label, as estimated on validation texts without their labels."""
    classifiers: tuple[str, ...] = ()
    """Sequence classifiers to compare with, by hub id or folder, such as `ProsusAI/finbert`; one not to be had is told."""
    runs: tuple[str, ...] = ()
    """Earlier runs to compare with, by their names beside this run's or by folder; they answered the same rows."""
    parts: tuple[Literal["validation", "test"], ...] = ("test",)
    """Which parts are scored; look at `test` once, at the end."""
    batch_tokens: int = Field(default=16_384, ge=256)
    """Tokens in one scoring batch, padding included."""
    bootstrap_draws: int = Field(default=2000, ge=100)
    """Draws of twin groups for the 95 % intervals."""


class Tracking(Spec):
    """Weights & Biases; metrics.jsonl in the run folder mirrors it in any case."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with an API key, else offline (the run folder then says how to sync)."""
    project: str = "finllm"
    """Where runs are shown."""
    entity: str | None = None
    """User or team; null is the key's own."""
    group: str | None = None
    """Runs of one name are shown together; a sweep sets it."""
    tags: tuple[str, ...] = ()
    """Words to find the run by."""


class Resources(Spec):
    """The machine's share that a run asks for."""

    gpus: int | Literal["auto"] = "auto"
    """GPUs to use, one process each; auto is all that are visible, 0 is the CPU."""
    gpu: str | None = None
    """Plan for this GPU although it is not here, such as `a100-80gb` (with --dry-run)."""
    cpu_processes: int = Field(default=1, ge=1)
    """Processes where there is no GPU (gloo)."""

    @model_validator(mode="after")
    def _agrees(self) -> "Resources":
        if isinstance(self.gpus, int) and self.gpus < 0:
            raise ValueError(f"gpus is {self.gpus}; write auto, or a number from 0")
        return self


class Distributed(Spec):
    """How the GPUs (or processes) of a run share its work and its memory; docs/distributed.md compares them."""

    strategy: Literal["auto", Strategy] = "auto"
    """single: one process. ddp: each holds everything. zero2 (DeepSpeed): gradients and optimizer states are shared out.
    fsdp (torch), zero3 (DeepSpeed): weights too. auto: the first of ddp, zero2, fsdp that fits into memory."""
    offload: bool = False
    """Hold what is shared out in the host's memory while it is not needed: slower, and least memory on the GPU."""

    @model_validator(mode="after")
    def _shares_something(self) -> "Distributed":
        if self.offload and self.strategy not in SHARDED:
            raise ValueError(
                f"offload is for what is shared out; strategy is {self.strategy}, write {', '.join(SHARDED)}"
            )
        return self


class Recipe(Spec):
    """One experiment: a base model, data, a method, and what to compare at the end."""

    purpose: str = ""
    """One line for the table of `finllm recipes`."""
    model: Annotated[Model, BeforeValidator(named, json_schema_input_type=str | Model)]
    """The base model; there is no default. `smollm2-135m` needs no hub."""
    data: Annotated[
        tuple[DataSpec, ...],
        BeforeValidator(listed, json_schema_input_type=str | DataSpec | tuple[str | DataSpec, ...]),
    ] = Field(min_length=1)
    """One data set or several; there is no default. `sample` is shipped."""
    prompt: Prompt = Prompt()
    lora: Lora | None = Lora()
    """null trains all weights."""
    train: Annotated[Sft | Dpo, Field(discriminator="method")] | None = None
    """How to train; null only evaluates the model as it is (zero-shot)."""
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    resources: Resources = Resources()
    distributed: Distributed = Distributed()

    @model_validator(mode="after")
    def _agrees(self) -> "Recipe":
        if self.train is not None and self.lora is None and self.model.quantization != "none":
            raise ValueError(
                f"model.quantization is {self.model.quantization} but lora is null: quantised weights cannot be "
                "trained. Set model.quantization to none, or give lora a rank"
            )
        if self.train is not None and self.train.shared_prefix == "on" and (why := self.prefix_not_shared_because):
            raise ValueError(f"train.shared_prefix is on, but {why}; write auto, or change that")
        self._refuse_strategy()
        names = [spec.title for spec in self.data]
        if len(set(names)) < len(names):
            raise ValueError(f"data names the same set twice ({', '.join(names)}); give each its own `alias`")
        return self

    def _refuse_strategy(self) -> None:
        """What the strategy cannot carry out, on any machine."""
        strategy, train = self.distributed.strategy, self.train
        if train is None or strategy not in SHARDED:
            return
        if strategy != "zero2" and self.model.quantization == "int8":
            raise ValueError(
                f"distributed.strategy is {strategy} but model.quantization is int8: LLM.int8() keeps statistics of whole "
                "rows beside its weights, which cannot be shared out. Write nf4, or strategy ddp or zero2"
            )
        if train.optimizer != "adamw":
            raise ValueError(
                f"distributed.strategy is {strategy} but train.optimizer is {train.optimizer}: bitsandbytes' optimizers "
                "know only whole tensors. Write adamw (distributed.offload holds its states on the host)"
            )
        if train.hand_written == "on":
            raise ValueError(
                f"distributed.strategy is {strategy} but train.hand_written is on: the hand-written passes need all "
                "weights in one place. Write hand_written: auto, or strategy ddp"
            )

    @property
    def explanations(self) -> Explanations | None:
        """How explanations are learnt, or None where they are not."""
        return self.train.explanations if isinstance(self.train, Sft) else None

    @property
    def prefix_not_shared_because(self) -> str | None:
        """What in the recipe keeps rows from sharing the computation of their common tokens, or None."""
        if self.lora is not None and self.lora.dropout > 0:
            return f"lora.dropout is {self.lora.dropout:g}: a shared token would drop the same for all rows"
        if self.model.attention != "sdpa":
            return f"model.attention is {self.model.attention}: only sdpa has a counterpart"
        return None


def load(path: Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """The recipe at `path`, changed by `key=value` overrides; raises RecipeError with every fault at once."""
    return yamlfile.parse(Recipe, yamlfile.read(Path(path), overrides))


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as YAML that loads to the same recipe."""
    import io

    from ruamel.yaml import YAML

    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(recipe.model_dump(mode="json", exclude_unset=True), stream)
    return stream.getvalue()
