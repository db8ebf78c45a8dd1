"""A model that is to be served, and how: what a launcher needs to make the application wherever it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sca_registry import RegistryError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from sca_registry.contracts import Captioner

NEEDED = ("fastapi", "fastapi_offline", "uvicorn", "python_multipart", "prometheus_client")


@dataclass(frozen=True)
class Hosted:
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
    body: int = 32 * 2**20
    pixels: int = 50_000_000
    prompts: int = 4096
    seconds: float = 60.0
    waiting: int = 10_000
    cache: int = 512 * 2**20
    clients: int = 512
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    keys: tuple[str, ...] = field(default=(), repr=False)
    root_path: str = ""
    log: bool = False
    trust_remote_code: bool = False
    allow_external: bool = False

    def check(self) -> None:
        """RegistryError if what serving needs is not installed."""
        missing = [name for name in NEEDED if find_spec(name) is None]
        if missing:
            raise RegistryError(f"serving needs {' and '.join(missing)}: pip install 'segment-caption-anything[serve]'")

    def captioner(self) -> Captioner:
        import torch

        from sca.inference.factory import captioner

        torch.manual_seed(self.seed)
        agreed = {"trust_remote_code": self.trust_remote_code, "allow_external": self.allow_external}
        return captioner(self.model, self.device, **agreed, **({"dtype": self.dtype} if self.dtype else {}))

    def application(self, captioner: Captioner | None = None) -> FastAPI:
        """The application, with a captioner that may have been made already."""
        from sca.serve.app import application
        from sca.serve.scheduler import RequestScheduler
        from sca.serve.schema import Limits

        limits = Limits(self.body, self.pixels, self.prompts, self.seconds, self.clients)
        scheduler = RequestScheduler(
            captioner or self.captioner(), cache=self.cache, waiting=self.waiting, max_found=self.prompts
        )
        return application(scheduler, self.model, limits, self.origins, self.hosts, self.keys, self.root_path)
