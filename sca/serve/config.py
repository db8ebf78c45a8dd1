"""A model that is to be served, and how: what a launcher needs to make the application wherever it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sca_registry import RegistryError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from sca_registry.contracts import Captioner

REQUIRED_PACKAGES = ("fastapi", "fastapi_offline", "uvicorn", "python_multipart", "prometheus_client")


@dataclass(frozen=True)
class ServerConfig:
    """model, device, dtype, seed: as `sca caption` takes them. body: bytes of a request. pixels: of an image. prompts:
    of a request. seconds: until a request is there, and again until its answer is. waiting: regions. cache: bytes of
    features that are kept. clients: connections at a time. origins: whose pages may ask from a browser. hosts: names
    accepted in the Host header. keys: API keys. root_path: below which a proxy shows the server. log: a
    line for each request. trust_remote_code, allow_external: what the model may do, see `sca.load`; no request can
    change it.
    """

    model: str
    device: str = "cpu"
    dtype: str | None = None
    seed: int = 0
    max_body_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    max_prompts: int = 4096
    timeout: float = 60.0
    max_queue: int = 10_000
    feature_cache_bytes: int = 512 * 2**20
    max_connections: int = 512
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    root_path: str = ""
    log_requests: bool = False
    trust_remote_code: bool = False
    allow_external: bool = False

    def check_installed(self) -> None:
        """RegistryError if what serving needs is not installed."""
        missing_packages = [name for name in REQUIRED_PACKAGES if find_spec(name) is None]
        if missing_packages:
            raise RegistryError(
                f"serving needs {' and '.join(missing_packages)}: pip install 'segment-caption-anything[serve]'"
            )

    def load_captioner(self) -> Captioner:
        import torch

        from sca.inference.factory import captioner

        torch.manual_seed(self.seed)
        trust_options = {"trust_remote_code": self.trust_remote_code, "allow_external": self.allow_external}
        return captioner(self.model, self.device, **trust_options, **({"dtype": self.dtype} if self.dtype else {}))

    def create_app(self, captioner: Captioner | None = None) -> FastAPI:
        """The application, with a captioner that may have been made already."""
        from sca.serve.app import create_app
        from sca.serve.scheduler import RequestScheduler
        from sca.serve.schema import ServerLimits

        limits = ServerLimits(
            self.max_body_bytes, self.max_pixels, self.max_prompts, self.timeout, self.max_connections
        )
        scheduler = RequestScheduler(
            captioner or self.load_captioner(),
            feature_cache_bytes=self.feature_cache_bytes,
            max_queue=self.max_queue,
            max_found_regions=self.max_prompts,
        )
        return create_app(
            scheduler, self.model, limits, self.allowed_origins, self.allowed_hosts, self.api_keys, self.root_path
        )
