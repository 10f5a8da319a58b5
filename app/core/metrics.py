"""Every metric's name, labels and help. Labels come from fixed sets: never a prompt, a tenant or an id."""

from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
JOB_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
ROW_BUCKETS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
RATIO_BUCKETS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 1, 2, 5)
HTTP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 30)

NAMES = frozenset(
    f"safelight_{name}"
    for name in [
        "queue_depth",
        "queue_oldest_job_age_seconds",
        "jobs_total",
        "job_duration_seconds",
        "queue_wait_seconds",
        "step_duration_seconds",
        "forward_seconds_total",
        "batch_rows",
        "batch_runs",
        "phase_seconds",
        "runs_in_flight",
        "denoiser_busy_ratio",
        "model_load_seconds",
        "model_loads_total",
        "model_evictions_total",
        "device_memory_bytes",
        "unstored_bytes",
        "wasted_seconds_total",
        "recovered_jobs_total",
        "estimate_error_ratio",
        "webhook_attempts_total",
        "webhook_lag_seconds",
        "http_request_seconds",
    ]
)


@dataclass(frozen=True, slots=True)
class ApiMetrics:
    """What the API counts; queue depth and age are read from Redis when asked."""

    registry: CollectorRegistry
    http_request_seconds: Histogram
    jobs_total: Counter
    queue_depth: Gauge
    queue_oldest_job_age_seconds: Gauge


def api_metrics() -> ApiMetrics:
    registry = CollectorRegistry()
    return ApiMetrics(
        registry,
        Histogram(
            "safelight_http_request_seconds",
            "Seconds from a request's head to the end of its reply.",
            ["route", "method", "status"],
            buckets=HTTP_BUCKETS,
            registry=registry,
        ),
        _jobs_total(registry),
        Gauge("safelight_queue_depth", "Jobs that wait.", ["queue"], registry=registry),
        Gauge(
            "safelight_queue_oldest_job_age_seconds",
            "Seconds the oldest waiting job has waited.",
            ["queue"],
            registry=registry,
        ),
    )


def _jobs_total(registry: CollectorRegistry) -> Counter:
    return Counter("safelight_jobs_total", "Jobs that ended.", ["model", "status"], registry=registry)


@dataclass(frozen=True, slots=True)
class WorkerMetrics:
    """What a worker counts."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    jobs_total: Counter = field(init=False)
    job_duration_seconds: Histogram = field(init=False)
    queue_wait_seconds: Histogram = field(init=False)
    step_duration_seconds: Histogram = field(init=False)
    forward_seconds_total: Counter = field(init=False)
    batch_rows: Histogram = field(init=False)
    batch_runs: Histogram = field(init=False)
    phase_seconds: Histogram = field(init=False)
    runs_in_flight: Gauge = field(init=False)
    denoiser_busy_ratio: Gauge = field(init=False)
    model_load_seconds: Gauge = field(init=False)
    model_loads_total: Counter = field(init=False)
    model_evictions_total: Counter = field(init=False)
    device_memory_bytes: Gauge = field(init=False)
    unstored_bytes: Gauge = field(init=False)
    wasted_seconds_total: Counter = field(init=False)
    recovered_jobs_total: Counter = field(init=False)
    estimate_error_ratio: Histogram = field(init=False)

    def __post_init__(self) -> None:
        r = self.registry
        made = {
            "jobs_total": _jobs_total(r),
            "job_duration_seconds": Histogram(
                "safelight_job_duration_seconds",
                "Seconds from submit to end of jobs that succeeded.",
                ["model"],
                buckets=JOB_BUCKETS,
                registry=r,
            ),
            "queue_wait_seconds": Histogram(
                "safelight_queue_wait_seconds",
                "Seconds a job waited before a worker took it.",
                ["model"],
                buckets=JOB_BUCKETS,
                registry=r,
            ),
            "step_duration_seconds": Histogram(
                "safelight_step_duration_seconds",
                "Seconds of one denoiser forward, timed on the device.",
                ["model"],
                buckets=STEP_BUCKETS,
                registry=r,
            ),
            "forward_seconds_total": Counter(
                "safelight_forward_seconds_total",
                "Seconds of forwards: of the denoiser, the text encoders and the VAE.",
                ["model", "module"],
                registry=r,
            ),
            "batch_rows": Histogram(
                "safelight_batch_rows", "Rows of one denoiser forward.", ["model"], buckets=ROW_BUCKETS, registry=r
            ),
            "batch_runs": Histogram(
                "safelight_batch_runs",
                "Images that shared one denoiser forward.",
                ["model"],
                buckets=ROW_BUCKETS,
                registry=r,
            ),
            "phase_seconds": Histogram(
                "safelight_phase_seconds",
                "Seconds of a job's phases: encode, denoise, decode, store.",
                ["model", "phase"],
                buckets=JOB_BUCKETS,
                registry=r,
            ),
            "runs_in_flight": Gauge("safelight_runs_in_flight", "Images in the making.", ["model"], registry=r),
            "denoiser_busy_ratio": Gauge(
                "safelight_denoiser_busy_ratio",
                "Share of the last interval in which the denoiser ran.",
                ["model"],
                registry=r,
            ),
            "model_load_seconds": Gauge(
                "safelight_model_load_seconds", "Seconds to load and warm up the model.", ["model"], registry=r
            ),
            "model_loads_total": Counter(
                "safelight_model_loads_total", "Loads of the model: ok or failed.", ["model", "outcome"], registry=r
            ),
            "model_evictions_total": Counter(
                "safelight_model_evictions_total", "Times the model made room for another.", ["model"], registry=r
            ),
            "device_memory_bytes": Gauge(
                "safelight_device_memory_bytes",
                "Memory of the device (of the process on a CPU).",
                ["device", "kind"],
                registry=r,
            ),
            "unstored_bytes": Gauge(
                "safelight_unstored_bytes", "Finished pictures that wait for the object store.", ["place"], registry=r
            ),
            "wasted_seconds_total": Counter(
                "safelight_wasted_seconds_total",
                "Denoiser seconds whose result nobody got.",
                ["reason"],
                registry=r,
            ),
            "estimate_error_ratio": Histogram(
                "safelight_estimate_error_ratio",
                "Error of what was expected, against the whole time: finish, at submission; eta, half-way.",
                ["model", "kind"],
                buckets=RATIO_BUCKETS,
                registry=r,
            ),
            "recovered_jobs_total": Counter(
                "safelight_recovered_jobs_total", "Jobs of dead workers that were put back.", registry=r
            ),
        }
        for name, metric in made.items():
            object.__setattr__(self, name, metric)


OUTCOMES = ("delivered", "retried", "skipped", "gone", "disabled", "refused", "given_up", "unreadable")


@dataclass(frozen=True, slots=True)
class SenderMetrics:
    """What the sender counts; outcomes as in `webhooks.Outcome`."""

    registry: CollectorRegistry
    webhook_attempts_total: Counter
    webhook_lag_seconds: Histogram


def sender_metrics() -> SenderMetrics:
    registry = CollectorRegistry()
    attempts = Counter("safelight_webhook_attempts_total", "Webhook attempts.", ["outcome"], registry=registry)
    for outcome in OUTCOMES:
        attempts.labels(outcome)  # from 0: an alert on increase() sees the first of them too
    return SenderMetrics(
        registry,
        attempts,
        Histogram(
            "safelight_webhook_lag_seconds",
            "Seconds from an event to its first attempt.",
            buckets=HTTP_BUCKETS,
            registry=registry,
        ),
    )
