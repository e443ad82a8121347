"""A run's configuration: frozen dataclasses, one per group of keys, checked when made.

Units stand in the names or in the sentence under a field. What one group can know is checked in its
``__post_init__``; what needs two groups, in ``Config``'s; what needs the machine, the data or the
model, where those are met. Every check raises :class:`UserError`, whose text is one line: field,
value, constraint, remedy.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from zo.config.checks import MAX_THREADS, at_least, at_most, choice, number, template_columns
from zo.config.objective import GenerationConfig as GenerationConfig
from zo.config.objective import ObjectiveConfig as ObjectiveConfig
from zo.config.outcome import EvalConfig as EvalConfig
from zo.config.outcome import ExportConfig as ExportConfig
from zo.config.peft import PeftConfig as PeftConfig
from zo.config.table import BatchConfig as BatchConfig
from zo.config.table import EstimatorConfig as EstimatorConfig
from zo.config.table import check_table, directions, grid
from zo.errors import UserError
from zo.io.engines import ENGINES
from zo.method.table import Grid
from zo.method.update import RULES, SCHEDULES

TASKS = ("causal-lm", "sequence-classification", "masked-lm", "seq2seq-lm")
"""Names of :data:`zo.model.build.AUTO_CLASS`, which imports transformers."""
AUTO = "auto"
"""Value of ``update.lr`` for a rate that is found at start."""
STORES = ("device", "host", "disk")
"""Names of the stores that :mod:`zo.streaming.replica` makes, which imports torch."""


@dataclass(frozen=True)
class ModelConfig:
    """Model, its source and its stored type."""

    name: str = ""
    """Hub id, local folder, or the quickstart's packaged model ``smollm2-135m-instruct``."""
    weights: str = "pretrained"
    """``pretrained``, or ``random`` to build from the configuration alone."""
    dtype: str = "float32"
    """Stored type of the weights: ``float32``, ``bfloat16`` or ``float16``."""
    task: str = "auto"
    """``causal-lm``, ``sequence-classification``, ``masked-lm``, ``seq2seq-lm`` (an encoder reads
    the prompt, a decoder makes the completion), or ``auto`` to read it from the model's
    configuration."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, where it is not the model's own."""
    attention: str = "auto"
    """``attn_implementation`` of transformers, or ``auto``: ``sdpa`` where the model supports it,
    else ``eager``."""
    trust_remote_code: bool = False
    """Run code that the model's repository brings."""
    train: str | None = None
    """Names of the parameters to train, as shell patterns separated by |, such as
    '*.v_proj.*|*norm*'; the others are frozen. All by default."""

    def __post_init__(self) -> None:
        if self.train is not None and not all(p.strip() for p in self.train.split("|")):
            raise UserError(
                f"model.train={self.train!r} has an empty pattern; give patterns of parameter "
                "names separated by |, such as '*.v_proj.*|*norm*', or leave it out to train all"
            )
        choice("model.weights", self.weights, ("pretrained", "random"))
        choice("model.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        choice("model.task", self.task, ("auto", *TASKS))


@dataclass(frozen=True)
class DataConfig:
    """Examples and their prompts."""

    name: Any = ""
    """A task (``movie-reviews``), a file (.jsonl, .json, .csv, .tsv, .parquet, or .txt, one text),
    a list or a pattern of files, a folder, a hub id, or ``synthetic``."""
    subset: str | None = None
    """Configuration of a hub data set, such as ``sst2`` of ``nyu-mll/glue``."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; a task brings its own."""
    split: str = "train"
    """Split of a hub data set or a folder to train on."""
    dev: Any = None
    """Files or a split to evaluate on, of a task also ``test``: 1,000 rows of its test split;
    without it, examples are held out of the training data."""
    columns: Any = None
    """Names of your columns where they are other ones: ``{text: review, label: sentiment}``."""
    dev_examples: int = 256
    """Examples evaluated on, at most; held out of the training data, at most a fifth of it."""
    train_examples: int | None = None
    """Examples trained on, at most; all by default."""
    per_label: int | None = None
    """Examples of each label to train on, at most, and as many held out, in place of the two keys
    above."""
    template: str | None = None
    """Prompt of an example with a label; ``{column}`` stands for the column's text, ``{mask}`` for
    the mask token of a masked language model. A task brings its own."""
    label_words: list[str] | None = None
    """One word a class, in the order of the labels, given with its space; words of several tokens
    are compared by the mean log-likelihood of their tokens."""

    def __post_init__(self) -> None:
        for key in ("name", "dev"):
            if (value := getattr(self, key)) is not None:
                files = value if isinstance(value, list) else [value]
                object.__setattr__(self, key, ",".join(str(file) for file in files))
        if not isinstance(self.columns or {}, dict):
            raise UserError(
                f"data.columns={self.columns} is not a mapping; give our names and yours, such as "
                "data.columns='{text: review, label: sentiment}'"
            )
        at_least("data.dev_examples", self.dev_examples, 0)
        for key in ("train_examples", "per_label"):
            if (value := getattr(self, key)) is not None:
                at_least(f"data.{key}", value, 1)
        if self.label_words is not None and len(set(self.label_words)) < max(
            2, len(self.label_words)
        ):
            raise UserError(
                f"data.label_words={self.label_words} needs two or more different words"
            )
        if self.label_words is not None and not all(word.strip() for word in self.label_words):
            raise UserError(
                f"data.label_words={self.label_words} has an empty word; give each class a word"
            )
        if self.template is not None:
            template_columns(self.template)


@dataclass(frozen=True)
class UpdateConfig:
    """Update of the weights from scalars."""

    name: str = "sgd"
    """The rule; ``sgd``."""
    lr: Any = 1e-6
    """Learning rate, or ``auto``: some are tried for a few steps at start, and the largest that
    lowers the loss with a margin is used."""
    schedule: str = "constant"
    """``constant``, ``linear`` or ``cosine``; both reach 0 one step after the last, so that the
    last still moves."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decay a step is lr times this; none on parameters of fewer than two dims (biases, norms)."""
    anchor: float = 0.0
    """Decay toward the base model's weights: a step shrinks the distance to them by lr times this,
    in the blocks that its directions reach. For weights stored in float32; the checkpoint is read
    again."""
    clip: float | None = None
    """Limit of a projected gradient, in root mean squares of those of the last 16 steps; none by
    default."""

    def __post_init__(self) -> None:
        choice("update.name", self.name, RULES)
        choice("update.schedule", self.schedule, SCHEDULES)
        if self.lr != AUTO:
            object.__setattr__(self, "lr", number("update.lr", self.lr, f"a number or {AUTO}"))
        for key in ("lr", "warmup_steps", "weight_decay", "anchor"):
            if (value := getattr(self, key)) != AUTO:
                at_least(f"update.{key}", value, 0)
        if self.clip is not None and not (math.isfinite(self.clip) and self.clip > 0):
            raise UserError(
                f"update.clip={self.clip} must be a number above 0, such as 2; leave it empty for "
                "no limit"
            )


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes: perturb x data is the number of ranks.

    An empty axis is the first size that fits, perturb first.
    """

    perturb: int | None = None
    """Ranks that share the rows (probes)."""
    data: int | None = None
    """Ranks that share the columns (micro-batches)."""
    slice: int = 1
    """Ranks of a node that keep one copy of the weights together, with memory.store=host or
    disk."""
    timeout_s: int = 1800
    """Seconds that ranks wait for one another before the run ends, naming the one that is
    missing."""
    check_every: int = 100
    """Steps between checks that every rank's weights are what the log makes of the base; 0:
    never."""

    def __post_init__(self) -> None:
        for axis in ("perturb", "data", "slice", "timeout_s"):
            if (size := getattr(self, axis)) is not None:
                at_least(f"mesh.{axis}", size, 1)
        at_least("mesh.check_every", self.check_every, 0)


@dataclass(frozen=True)
class MemoryConfig:
    """Memory of the weights, and the unit of a visit."""

    store: str = "device"
    """``device``: all weights where the model computes; ``host``: in host memory; ``disk``: in the
    run's folder."""
    unit: str = "layer"
    """Size of a block: a ``layer``, or each ``module`` with parameters, for the least memory."""
    slots: int = 3
    """Blocks that have room where the model computes: one computes, one comes, one goes; at least
    2."""
    lag: int = 4
    """Entries that a block in a store may lag behind before it is written back; replayed in one
    pass at its visits."""
    disk_engine: str = "mmap"
    """``mmap``, or ``deepnvme``: DeepSpeed's direct I/O, which needs the extra nvme and libaio."""
    pin: bool = True
    """Lock a host store's memory for the GPU's copies; without effect where there is no GPU."""
    activations: str = "device"
    """Memory of a waiting forward's hidden states: ``device``, or ``host``."""

    def __post_init__(self) -> None:
        choice("memory.store", self.store, STORES)
        choice("memory.unit", self.unit, ("layer", "module"))
        choice("memory.disk_engine", self.disk_engine, ENGINES)
        choice("memory.activations", self.activations, ("device", "host"))
        at_least("memory.slots", self.slots, 2)
        at_least("memory.lag", self.lag, 1)


@dataclass(frozen=True)
class ProfileConfig:
    """Profiling of a run."""

    steps: str | None = None
    """Steps ``a..b`` whose timeline is drawn: ``timeline.json`` for Chrome or Perfetto and
    ``timeline.png``."""

    def __post_init__(self) -> None:
        if self.steps is not None and not self.range:
            raise UserError(
                f"profile.steps={self.steps} is not a range of steps; give the first and the last, "
                "such as 3..4"
            )

    @property
    def range(self) -> range:
        """The steps, from 1."""
        found = re.fullmatch(r"(\d+)\.\.(\d+)", self.steps or "")
        return range(int(found[1]), int(found[2]) + 1) if found and int(found[1]) else range(0)


@dataclass(frozen=True)
class RunConfig:
    """Folder, length and seed of a run."""

    dir: str | None = None
    """The run's folder; by default ``runs/`` and the recipe's name with the time."""
    steps: int = 1000
    """Steps in all, resumed ones included."""
    seed: int = 0
    """Seed of everything that is random."""
    snapshot_every: int = 0
    """Steps between snapshots of the weights, which bound how much a resume replays; 0: never. Of a
    run with memory.store=disk the blocks on disk are that already, so none are made."""
    device: str = "auto"
    """``cpu``, ``cuda``, or ``auto`` for ``cuda`` where there is one."""
    threads: int | None = None
    """Threads that a rank computes with on CPU; by default the machine's cores, shared among its
    ranks. Products of 5 to 11 rows in float32 may depend on it."""
    max_skipped: int = 10
    """Steps in a row that may give no finite estimate before the run stops."""
    divergence: str = "stop"
    """``stop`` the run where its loss has risen far over its start, or to that of guessing; or
    ``warn`` once."""
    extend: bool = False
    """Go on with other rates where the folder's run has a schedule over fewer ``run.steps``."""
    trackers: list[str] | None = None
    """Trackers of accelerate that get the metrics, such as ``[wandb]``; by default tensorboard
    where it is installed; ``[]``: none."""

    def __post_init__(self) -> None:
        for key in ("steps", "seed", "snapshot_every"):
            at_least(f"run.{key}", getattr(self, key), 0)
        at_least("run.max_skipped", self.max_skipped, 1)
        if self.threads is not None:
            at_least("run.threads", self.threads, 1)
            at_most("run.threads", self.threads, MAX_THREADS)
        if self.seed >= 2**63:
            raise UserError(f"run.seed={self.seed} is out of range; use a number below 2**63")
        choice("run.device", self.device, ("auto", "cpu", "cuda"))
        choice("run.divergence", self.divergence, ("stop", "warn"))


@dataclass(frozen=True)
class Config:
    """A whole run."""

    recipe: str = ""
    """Name of the recipe it came from; a label."""
    task: str | None = None
    """A task of the papers by name, such as ``sst2``: its rows, splits, prompt and label words;
    data.name=FOLDER takes rows with the same columns from there."""
    model: ModelConfig = field(default_factory=ModelConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    run: RunConfig = field(default_factory=RunConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        check_table(self.batch, self.estimator)
        if self.peft.type is not None and self.model.train is not None:
            raise UserError(
                f"model.train={self.model.train!r} and peft.type={self.peft.type} both say what is "
                "trained; leave one of them out"
            )
        if self.mesh.slice > 1 and self.memory.store == "device":
            raise UserError(
                f"mesh.slice={self.mesh.slice} cuts weights that come to the device at every "
                "visit; use memory.store=host or disk, or mesh.slice=1"
            )

    @property
    def directions(self) -> int:
        """Directions a step."""
        return directions(self.batch, self.estimator)

    @property
    def grid(self) -> Grid:
        """Folds of a step's loss table, as the mesh deals them out."""
        return grid(self.batch, self.estimator)
