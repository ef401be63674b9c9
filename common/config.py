"""Configuration of a run: frozen sections with their defaults, limits and meaning.

The same keys exist in three forms: these dataclasses (``snake_case``), TOML files
(``[train]`` / ``learning-rate``) and Flower's flat run-config (``train.learning-rate``).
Reading, writing and validating live in ``common.configio``.
"""

from dataclasses import dataclass
from typing import Literal

from common.option import option
from common.template import template_fault

IN_PROCESS = "in-process"
"""Value of ``run.backend``: no SuperLink and no Ray."""
Missing = Literal["unknown", "drop", "median"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tables are and how they become samples."""

    path: str = option(
        "synthetic",
        "folder of MIMIC-IV tables (it holds hosp/), a MEDS data set (data/, metadata/) or eICU's "
        "tables (patient.csv.gz ...), or `synthetic`",
        file=True,
    )
    meds_codes: str = option(
        "",
        "toml file that says what the codes of a MEDS data set mean; empty: as for MIMIC-IV",
        file=True,
    )
    protocol: Literal["admission", "visits", "first-24h"] = option(
        "admission",
        "what is asked of a sample: the list of a whole stay from its discharge diagnoses; the "
        "same of patients with two visits or more, from the earlier visits too; or what is ordered "
        "after the first 24 hours, from what is known then",
    )
    synthetic_patients: int = option(240, "patients that the synthetic source writes", low=10)
    synthetic_seed: int = option(0, "seed of the synthetic source", low=0)
    split_seed: int = option(0, "seed of the hash that puts a patient into a split", low=0)
    validation_fraction: float = option(0.1, "share of patients for validation", low=0, high=0.5)
    test_fraction: float = option(0.2, "share of patients held out", low=0, high=0.5)
    train_samples: int = option(
        0, "training samples that a hospital uses, seeded choice; 0: all", low=0
    )
    drop_flushes: bool = option(True, "leave saline and heparin flushes out of the drug lists")
    missing_height: Missing = option("unknown", "what to do without a height")
    missing_weight: Missing = option("unknown", "what to do without a weight")
    missing_bmi: Missing = option("unknown", "what to do without a BMI")
    normalisation: Literal["string", "ingredient", "map", "atc-3", "atc-4"] = option(
        "string", "level at which drug names are equal"
    )
    drug_map: str = option(
        "", "csv with columns name,code for normalisation = map, atc-3, atc-4", file=True
    )
    drug_order: Literal["first-start", "name", "shuffled", "set"] = option(
        "first-start",
        "order of the drugs in training: by first start in the stay, by name, a new random one "
        "in every pass, or none: the first drug may be any, and only a few are written",
    )


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """What the model is asked; hospitals, answers and exports say the same."""

    system_prompt: str = option(
        "List the drugs for this hospital stay, one a line.", "the system message, as it is"
    )
    template: str = option(
        "",
        "file with the user message (its text becomes the value): `{diagnoses}` on a line of its "
        "own, and any of `{sex}`, `{age}`, `{height}`, `{weight}`, `{bmi}`; empty: FedRx's own",
        content=True,
        fault=template_fault,
    )


OWN_TEXT = TextConfig()
"""What FedRx asks where nobody set anything."""


@dataclass(frozen=True, kw_only=True)
class PartitionConfig:
    """How patients are dealt to hospitals."""

    scheme: Literal[
        "iid",
        "service",
        "admission-type",
        "insurance",
        "anchor-year-group",
        "careunit",
        "site",
        "dirichlet",
    ] = option("iid", "what decides a patient's hospital")
    alpha: float = option(0.5, "concentration of the dirichlet scheme", above=0)
    min_patients: int = option(
        1,
        "smallest hospital that is accepted, in patients; with scheme = site smaller sites are "
        "pooled",
        low=1,
    )
    seed: int = option(0, "seed of the partition", low=0)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen backbone."""

    backbone: str = option(
        "embedded", "`embedded`, `tiny`, a folder, or a hub id of a Llama", file=True
    )
    attention: Literal[
        "auto", "cudnn", "flash-attn-3", "flash-attn", "torch-flash", "sdpa", "eager"
    ] = option("auto", "attention kernel")
    kernels: Literal["auto", "triton", "compiled", "torch"] = option(
        "auto",
        "who does the elementwise work: triton on a GPU; on a CPU torch, or compiled, which starts "
        "later and saves a long run a tenth of its time or more, but not with privacy",
    )
    weights: Literal["bf16", "fp8", "nf4"] = option(
        "bf16",
        "format of the frozen weights: bf16 (or what train.dtype says), fp8 on a GPU, or nf4",
    )


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The low-rank adapter."""

    mode: Literal["fa-lora", "lora", "rolora"] = option(
        "fa-lora", "what is trained: B alone; A and B; B in odd rounds and A in even ones"
    )
    rank: int = option(16, "rank r", low=1, high=512)
    alpha: float = option(
        16.0, "scale numerator: the update is alpha / rank * B A", above=0, high=1e6
    )
    targets: str = option("q_proj,v_proj", "adapted projections, comma-separated")
    initialiser: Literal["kaiming-uniform", "orthonormal"] = option(
        "kaiming-uniform", "distribution of A"
    )
    seed: int = option(0, "seed of A; every party draws the same A from it", low=0)
    personal: bool = option(
        False,
        "train in every hospital a B of its own beside the global one, which never leaves it and "
        "which no epsilon covers; twice the steps",
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The local training step, shared by hospitals and the single-node mode."""

    seed: int = option(0, "seed of the data order", low=0)
    optimizer: Literal["sgd", "adamw"] = option("sgd", "optimizer of B")
    learning_rate: float = option(1e-3, "peak learning rate", above=0, high=1000)
    momentum: float = option(0.0, "momentum of SGD", low=0, high=0.9999)
    weight_decay: float = option(
        0.0, "decoupled (AdamW) or L2 (SGD) weight decay", low=0, high=1000
    )
    beta1: float = option(0.9, "first-moment decay of AdamW", low=0, high=0.9999)
    beta2: float = option(0.999, "second-moment decay of AdamW", low=0, high=0.999999)
    schedule: Literal["constant", "linear", "cosine"] = option(
        "constant", "learning rate over steps"
    )
    warmup_steps: int = option(0, "steps of linear warm-up", low=0)
    batch_size: int = option(4, "samples per micro-batch", low=1)
    accumulation: int = option(1, "micro-batches per optimizer step", low=1)
    max_grad_norm: float = option(0.0, "clip the gradient's L2 norm to this; 0 is off", low=0)
    max_length: int = option(2048, "tokens per sample; whole items are dropped beyond it", low=64)
    steps: int = option(0, "optimizer steps in all; 0: from epochs or rounds", low=0)
    epochs: float = option(0.0, "passes over the training samples; 0: from rounds", low=0)
    checkpoint_steps: str = option(
        "", "steps to checkpoint at, comma-separated; scaled if the run is shorter"
    )
    checkpoint_every: int = option(
        50, "steps between the checkpoints that a killed single run goes on from; 0: none", low=0
    )
    keep_state: bool = option(True, "carry optimizer state and step count over rounds")
    dtype: Literal["auto", "fp32", "bf16"] = option("auto", "backbone arithmetic")
    device: str = option("auto", "`auto`, `cpu`, `cuda` or `cuda:N`")
    recompute: Literal["auto", "none", "mlp", "half", "all"] = option(
        "auto", "activations recomputed in the backward pass"
    )
    threads: int = option(
        0, "CPU threads of one worker; 0: its share of the cores, at most OMP_NUM_THREADS", low=0
    )


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """Hospitals, rounds and aggregation."""

    hospitals: int = option(3, "hospitals that the samples are dealt to", low=1, high=10000)
    rounds: int = option(4, "federated rounds", low=1)
    local_steps: int = option(
        10,
        "optimizer steps per hospital and round, unless train.steps or train.epochs is set: "
        "those are dealt to the rounds",
        low=0,
    )
    strategy: Literal[
        "fedavg",
        "fedprox",
        "fedavgm",
        "fedadam",
        "fedyogi",
        "fedmedian",
        "trimmed-mean",
        "krum",
        "q-fedavg",
    ] = option("fedavg", "aggregation")
    fairness: float = option(
        1.0, "q of q-fedavg: how much hospitals with a larger loss count more; 0 is fedavg", low=0
    )
    proximal_mu: float = option(0.01, "weight of fedprox's pull to the global B", low=0)
    server_learning_rate: float = option(
        0.0,
        "step of fedavgm, fedadam and fedyogi, 1 / L of q-fedavg; 0: 1 for fedavgm and q-fedavg, "
        "else 0.01",
        low=0,
    )
    server_momentum: float = option(0.9, "momentum of fedavgm", low=0, high=0.9999)
    trim: float = option(0.2, "share that trimmed-mean cuts at each end", low=0, high=0.4999)
    malicious: int = option(1, "hospitals that krum takes for malicious", low=0)
    weighting: Literal["samples", "uniform"] = option("samples", "weight of a hospital's update")
    max_weight_share: float = option(
        3.0, "largest weight of one hospital, times the round's median weight; 0: no limit", low=0
    )
    max_update_norm: float = option(
        10.0,
        "largest change of B by one hospital, times the round's median change (L2 norm); a "
        "hospital beyond it is refused in that round; 0: no limit",
        low=0,
    )
    keep_updates: bool = option(
        False, "keep every hospital's B of each round on the server, in updates/"
    )
    fraction: float = option(1.0, "share of the hospitals asked per round", above=0, high=1)
    only: str = option(
        "",
        "ask these hospitals alone, by name, comma-separated; one is the local-only baseline; "
        "empty: all of them",
    )
    quorum: float = option(
        0.5, "share of the asked hospitals whose updates a round needs", above=0, high=1
    )
    codec: Literal["fp32", "bf16", "int8"] = option(
        "fp32", "how B is written on the wire; see common.wire.codecs"
    )
    min_hospitals: int = option(0, "hospitals that must be connected before round 1; 0: all", low=0)
    mismatch: Literal["stop", "refuse"] = option(
        "stop",
        "what a hospital with other code, backbone or A does before round 1: it stops the run, "
        "or is refused; one that joins later is refused",
    )
    seed: int = option(0, "seed of the hospital sampling", low=0)
    workers: int = option(
        0, "Ray actors of a simulation; 0: from cores, hospitals, memory and work", low=0
    )
    timeout_seconds: float = option(
        0.0, "longest wait for one round; 0: from measured steps", low=0, high=43200
    )


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Differential privacy of B; off while both target-epsilon and noise-multiplier are 0.

    Every value is a public constant: none may be chosen by looking at the data or its size.
    """

    target_epsilon: float = option(
        0.0, "epsilon of the whole run, which calibrates the noise; 0: no target", low=0
    )
    delta: float = option(1e-5, "probability with which epsilon may fail", above=0, high=0.1)
    noise_multiplier: float = option(
        0.0, "noise standard deviation over the clip norm; 0: from target-epsilon", low=0, high=2000
    )
    most_patients: int = option(
        0,
        "public bound on the patients of one hospital, which delta is held to; 0: none is stated, "
        "and data.synthetic-patients bounds the synthetic source",
        low=0,
    )
    clip_norm: float = option(1.0, "largest L2 norm of one unit's gradient", low=1e-6, high=1e6)
    sampling_rate: float = option(
        0.1, "probability with which each unit enters a step", above=0, high=1
    )
    expected_batch: float = option(8.0, "public divisor of the noised gradient sum", above=0)
    unit: Literal["patient", "admission", "hospital"] = option("patient", "what is protected")
    max_admissions_per_patient: int = option(
        4, "most admissions of a patient that are used; 0: all", low=0
    )
    accountant: Literal["prv", "rdp"] = option(
        "prv", "Opacus' accountant that is compared with the PLD"
    )
    deterministic_noise: bool = option(
        False, "reproducible noise, for tests only: epsilon is infinite"
    )

    @property
    def is_on(self) -> bool:
        """Whether any differential privacy is on: no loss, metric or count leaves a hospital."""
        return self.target_epsilon > 0 or self.noise_multiplier > 0


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Answers on held-out patients."""

    samples: int = option(0, "held-out samples to answer, seeded choice; 0: all", low=0)
    validation_samples: int = option(
        0, "validation samples per hospital for the loss; 0: all", low=0
    )
    batch_size: int = option(16, "answers generated at once", low=1)
    max_new_tokens: int = option(256, "longest answer in tokens", low=8)
    method: Literal["generate", "score"] = option(
        "generate",
        "how a list comes about: written by the model, or every name of the formulary scored and "
        "the ranking cut at a threshold chosen on validation patients",
    )
    decoding: Literal["greedy", "grammar", "formulary"] = option(
        "greedy",
        "what may be written: anything, the answer's grammar (needs llguidance), or each name of "
        "the formulary once",
    )
    formulary: str = option(
        "",
        "file of drug names, one a line; empty: what each hospital's training split holds",
        file=True,
    )
    interactions: str = option(
        "",
        "csv of interacting drugs (DDInter's, or columns drug_a,drug_b) for the rate of them",
        file=True,
    )
    threshold_samples: int = option(
        64, "validation samples per hospital that choose the threshold of scores; 0: all", low=0
    )
    public_validation: int = option(
        0,
        "made-up admissions, of no hospital, for a learning curve that costs no privacy: each "
        "checkpoint's loss is measured after training; 0: none",
        low=0,
    )
    frequencies: bool = option(
        False,
        "scored lists for hospitals with few validation patients: how often the training split "
        "orders a drug counts beside its score, and lists are as long as there on average",
    )
    bootstrap: int = option(1000, "resamples of the confidence intervals", low=100)
    seed: int = option(0, "seed of sample choice and bootstrap", low=0)


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """The LLM judge of ``fedrx judge``; see ``common.evaluation.judge.judging``."""

    base_url: str = option(
        "http://127.0.0.1:8000/v1", "OpenAI-compatible server; loopback keeps data on the machine"
    )
    model: str = option("", "judge model as the server names it; several judges comma-separated")
    repeats: int = option(1, "times that each judge is asked for each list", low=1, high=100)
    temperature: float = option(0.0, "sampling temperature of the judge", low=0, high=2)
    concurrency: int = option(8, "calls in flight", low=1, high=1024)
    timeout_seconds: float = option(120.0, "longest wait for one reply", above=0, high=86400)
    attempts: int = option(4, "tries per call when the server fails", low=1, high=20)
    max_output_tokens: int = option(4096, "longest reply in tokens", low=64)
    response_format: Literal["auto", "json-schema", "none"] = option(
        "auto", "ask the server for the JSON schema"
    )
    input_usd_per_million: float = option(0.0, "price in USD of 1e6 prompt tokens", low=0)
    output_usd_per_million: float = option(0.0, "price in USD of 1e6 reply tokens", low=0)
    max_cost_usd: float = option(
        0.0, "stop before the run's judging costs more; 0: no limit", low=0
    )
    api_key_env: str = option(
        "OPENAI_API_KEY",
        "environment variable that holds the API key; empty: the server needs none",
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run directory."""

    directory: str = option("", "run directory; empty: runs/<time>-<name>-<hash> below the cwd")
    name: str = option("run", "name that appears in the run directory and report")
    backend: Literal["ray", "in-process"] = option(
        "ray", "what runs the hospitals of a simulation: Flower on Ray, or this process alone"
    )
    port: int = option(
        0, "loopback port of the simulation's SuperLink; 0: a free one", low=0, high=65535
    )
    hospital_keys: str = option(
        "",
        "server's folder of the hospitals' public keys (NAME.pub): who calls itself NAME must sign "
        "with that key; empty: names are not checked (a simulation)",
    )
    tracker: Literal["none", "tensorboard", "mlflow"] = option(
        "none", "who draws the curves of metrics.jsonl while it trains"
    )
    tracker_url: str = option(
        "",
        "MLflow server; empty: files in the run directory; a host that is not loopback counts only "
        "on the command line",
    )
    tracker_agreement: str = option(
        "", "agreement that lets that host get figures of credentialed data"
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment, complete."""

    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    partition: PartitionConfig = PartitionConfig()
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    federation: FederationConfig = FederationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    judge: JudgeConfig = JudgeConfig()
    run: RunConfig = RunConfig()
