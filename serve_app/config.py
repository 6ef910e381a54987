"""What the service is told when it is built: read once, in `build`; each part receives only its own section.

The defaults are the embedded ones: one machine, the demo checkpoint on its CPU, SQLite and a folder.
cluster/serve/local.yaml says the same.
"""

import math
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from t2v_core.config import MAX_CACHED_STEPS, DType, Precision
from t2v_core.errors import InvalidRequest

# Serve gives a deployment up whose replicas fail to start three times: one that waits for its database does not.
DATABASE_PATIENCE_S = 300.0
_MIN_SECRET = 16

Seconds = Annotated[float, Field(gt=0)]
Frames = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=8, multiple_of=8)]  # of a video, in pixels


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)  # it may be a secret


class Placement(_Section):
    """What a replica takes of a node, and on which nodes it may be.

    `label_selector`: of Ray's node labels, as {"pool": "gpu"}. `max_replicas_per_node`: of a stage
    that takes a small share of a GPU, as many as a node has GPUs: more of them would leave the others no room.
    `max_surge_percent`: so many replicas of a new version are started before old ones are stopped, so that a version
    that does not start displaces none. 0 where there is no room for more, as in a fixed pool of GPUs.
    """

    num_cpus: float = Field(default=1.0, ge=0)
    resources: dict[str, float] = Field(default_factory=dict)
    label_selector: dict[str, str] = Field(default_factory=dict)
    max_replicas_per_node: int | None = Field(default=None, ge=1, le=100)
    max_surge_percent: int = Field(default=100, ge=0, le=100)

    @property
    def taken(self) -> dict[str, float]:
        """What each replica takes of a node, by Ray's names."""
        return {"CPU": self.num_cpus, **self.resources}


class Fixed(Placement):
    """As many replicas as it says."""

    num_replicas: int = Field(default=1, ge=1)

    @property
    def replicas(self) -> tuple[int, int]:
        """The fewest, and the most."""
        return self.num_replicas, self.num_replicas


class Scaling(Placement):
    """How many replicas a stage has, and the share of a machine each takes. `min_replicas` 0 scales to zero.

    `max_ongoing` requests share a replica: with more waiting, Serve starts another, as far as `max_replicas`.
    `num_threads`: of torch; by default as many as `num_cpus`, 0 for all cores of the machine.
    `dtype`: fp16 on a GPU and fp32 on a CPU by default; a CPU that is slower in half precision takes fp32 all the same.
    """

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    max_ongoing: int = Field(default=8, ge=1)
    num_gpus: float = Field(default=0.0, ge=0)
    num_threads: int | None = Field(default=None, ge=0)
    dtype: DType | None = None
    upscale_delay_s: float = Field(default=2.0, ge=0)
    downscale_delay_s: float = Field(default=60.0, ge=0)

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}: lower the first"
            )
        return self

    @property
    def taken(self) -> dict[str, float]:
        """See `Placement`."""
        return {**super().taken, "GPU": self.num_gpus}

    @property
    def replicas(self) -> tuple[int, int]:
        """The fewest, and the most."""
        return self.min_replicas, self.max_replicas


class TextEncoderConfig(Scaling):
    """Text encoders: on CPUs, and quick beside the rest."""

    max_ongoing: int = Field(default=64, ge=1)
    num_cpus: float = Field(default=0.2, ge=0)
    max_batch: int = Field(default=8, ge=1)
    batch_wait_s: float = Field(default=0.01, ge=0)
    cache_entries: int = Field(default=512, ge=1)


class DenoiserConfig(Scaling):
    """Denoisers: `max_ongoing` videos share a GPU, and `urgent_reserve` more if they are urgent.

    The reserve is of a fixed number of replicas: where they are scaled, an urgent video is only the first in line.

    `precision`: "fp8" is faster on Hopper GPUs, and not quite exact; `cached_steps`: so many in a row reuse coarse
    features, which is faster anywhere, and less exact (docs/performance.md says how much of both).
    `profile`: a file of the engine's measured step times, written where it is missing or of another kind of denoiser;
    without one they are measured at each start on a GPU. `warm_up`: sizes, (num_frames, height, width), of which no
    request shall be the first; the model's own is always among them.
    `hand_back_s`: so long before its node goes, where that is announced, a denoiser hands its videos to the others.
    """

    max_ongoing: int = Field(default=2, ge=1)
    urgent_reserve: int = Field(default=1, ge=0)
    num_cpus: float = Field(default=1.0, ge=0)
    max_surge_percent: int = Field(default=0, ge=0, le=100)
    num_threads: int | None = Field(default=0, ge=0)
    precision: Precision = "exact"
    cached_steps: int = Field(default=0, ge=0, le=MAX_CACHED_STEPS)
    profile: Path | None = None
    warm_up: tuple[tuple[Frames, Side, Side], ...] = ()
    checkpoint_every_s: Seconds = 5.0
    hand_back_s: Seconds = 10.0
    stuck_after_s: Seconds = 300.0  # on a GPU: at one step for so long, the replica is replaced
    preview_every_steps: int = Field(default=5, ge=0)


class DecoderConfig(Scaling):
    """Decoders: latents to frames, and frames to files in threads beside that."""

    stuck_after_s: Seconds = 300.0  # on a GPU: at one video for so long, the replica is replaced
    max_ongoing: int = Field(default=4, ge=1)
    num_cpus: float = Field(default=0.4, ge=0)
    max_surge_percent: int = Field(default=0, ge=0, le=100)
    num_threads: int | None = Field(default=0, ge=0)
    encoding_threads: int = Field(default=2, ge=1)


class GeneratorConfig(Fixed):
    """Generators: a fixed number of them that claim jobs and see each through the stages.

    Together they hold as many jobs as all denoisers can work on, those included that are decoded and stored: Serve's
    autoscaling sees what waits at the denoisers, and never the queue in the database. Calls have the same room, and
    where there are enough of both, half of it.
    """

    num_cpus: float = Field(default=0.1, ge=0)
    lease_s: Seconds = 10.0
    heartbeat_s: Seconds = 0.5
    poll_s: Seconds = 1.0
    max_attempts: int = Field(default=3, ge=1)
    drain_s: float = Field(default=5.0, ge=0)
    outage_s: float = Field(default=120.0, ge=0)  # how long a finished video waits for a store of files that is away
    expires_in_s: Seconds = 86_400.0  # after its end, a job and its files are removed
    sweep_every_s: Seconds = 60.0


class IngressConfig(Fixed):
    """The HTTP API."""

    num_cpus: float = Field(default=0.1, ge=0)
    max_ongoing: int = Field(
        default=1_000, ge=1
    )  # a watched video holds one: half of them, and a quarter of one key, may
    max_queued: int | None = Field(default=1_000, ge=1)
    max_queued_per_key: int | None = Field(default=100, ge=1)
    max_calls: int | None = Field(default=100, ge=1)  # to /sync and by handle, at each Ingress: they wait there
    max_calls_per_key: int | None = Field(default=20, ge=1)  # of these to /sync
    max_body_bytes: int = Field(default=1 << 20, ge=1)
    max_upload_bytes: int = Field(default=64 << 20, ge=1)  # of a body with an input video
    max_pixel_frames: int | None = Field(default=None, ge=1)  # by default what the denoisers' memory holds, measured


class KeysConfig(_Section):
    """API keys, as lines of "name:key": in a file, or right here. Neither: none is needed."""

    file: Path | None = None
    keys: str | None = Field(default=None, repr=False)


class WebhooksConfig(_Section):
    """Who is told that a video has ended. Without a secret, no request may name a webhook_url.

    `secret`, or the one in `secret_file`, signs: each key's messages with a secret of its own that is made of it, which
    `t2v webhook-secret NAME` prints.
    `allow_private` is for trials: this machine and private networks are told as well, and by http. A message that does
    not arrive is sent again after each of `retry_delays_s`, and then given up.
    """

    secret: str | None = Field(default=None, repr=False, min_length=_MIN_SECRET)
    secret_file: Path | None = None
    allow_private: bool = False
    timeout_s: Seconds = 10.0
    retry_delays_s: tuple[Seconds, ...] = (5, 60, 300, 1_800, 7_200, 18_000, 36_000, 86_400)
    look_every_s: Seconds = 1.0

    def with_secret(self) -> Self:
        """The same with the file's secret. Raises InvalidRequest where that cannot be read, or is too short."""
        if self.secret_file is None:
            return self
        try:
            secret = self.secret_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(
                f"webhooks.secret_file {self.secret_file}: cannot be read ({error})", param="webhooks"
            ) from error
        if len(secret) < _MIN_SECRET:
            raise InvalidRequest(
                f"webhooks.secret_file {self.secret_file}: holds {len(secret)} characters; write {_MIN_SECRET} or more",
                param="webhooks",
            )
        return self.model_copy(update={"secret": secret})


class StorageConfig(_Section):
    """Where jobs and videos are kept. A relative path is taken from where the service is started."""

    database: str = "sqlite:///outputs/t2v.db"
    artifacts: str = "outputs/store"
    artifact_options: dict[str, str] = Field(default_factory=dict)


class AppConfig(_Section):
    """The whole service."""

    model: str = "demo"
    revision: str | None = None
    storage: StorageConfig = StorageConfig()
    keys: KeysConfig = KeysConfig()
    webhooks: WebhooksConfig = WebhooksConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    decoder: DecoderConfig = DecoderConfig()
    generator: GeneratorConfig = GeneratorConfig()
    ingress: IngressConfig = IngressConfig()
    health_check_s: Seconds = 2.0
    longest_generation_s: Seconds = 600.0

    @property
    def parts(self) -> dict[str, Scaling | Fixed]:
        """The sections that are deployments, by their names."""
        parts = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: part for name, part in parts.items() if isinstance(part, Scaling | Fixed)}

    @property
    def jobs_per_generator(self) -> int:
        """How many jobs one Generator holds, so that all together can fill every denoiser."""
        total = self.denoiser.max_replicas * self.denoiser.max_ongoing
        return math.ceil(total / self.generator.num_replicas)
