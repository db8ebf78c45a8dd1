"""Server configuration: plain values from which any process can create the application."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sca_registry import RegistryError

from sca.inference.zoom_options import DEFAULT_ZOOM, ZoomValue

if TYPE_CHECKING:
    from fastapi import FastAPI
    from sca_registry.contracts import Captioner

REQUIRED_PACKAGES = ("fastapi", "fastapi_offline", "uvicorn", "python_multipart", "prometheus_client")


@dataclass(frozen=True)
class ServerConfig:
    """Configuration of a server.

    Args:
        model: Source of the captioner; see `sca.load_captioner`.
        device: Device of the model.
        precision: Precision of the model, see `sca.load`; None for that of the checkpoint.
        seed: Random seed.
        zoom: Default of the field `zoom` of requests; see `sca.inference.zoom_options.check_zoom`.
        max_body_bytes: Maximum bytes per request.
        max_pixels: Maximum number of pixels per image.
        max_prompts: Maximum number of prompts per request; also limits the regions found in everything mode.
        timeout: Time limit in seconds, applied separately to receiving a request and to responding to it.
        max_queue: Maximum queued regions across all requests.
        feature_cache_bytes: Size of the image feature cache.
        max_connections: Maximum concurrent connections.
        allowed_origins: Web origins allowed to call the server (CORS).
        allowed_hosts: Additional Host headers to accept.
        api_keys: API keys; empty to require none.
        root_path: URL path of the server behind a proxy.
        label_studio: Serve predictions for Label Studio.
        label_studio_url: URL of Label Studio, from which images may be downloaded; "" for none.
        image_urls: URLs of further servers from which images of tasks may be downloaded.
        label_studio_key: Access token of Label Studio; "" for none.
        log_requests: Log each request.
        trust_remote_code: Allow a checkpoint to run its own code; see `sca.load`. Requests cannot change it.
        allow_external: Allow a checkpoint to refer to files outside its folder; see `sca.load`.
    """

    model: str
    device: str = "cpu"
    precision: str | None = None
    seed: int = 0
    zoom: ZoomValue = DEFAULT_ZOOM
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
    label_studio: bool = False
    label_studio_url: str = ""
    image_urls: tuple[str, ...] = ()
    label_studio_key: str = field(default="", repr=False)
    log_requests: bool = False
    trust_remote_code: bool = False
    allow_external: bool = False

    def check_installed(self) -> None:
        """Check that the packages for serving are installed.

        Raises:
            RegistryError: A package is missing.
        """
        missing_packages = [name for name in REQUIRED_PACKAGES if find_spec(name) is None]
        if missing_packages:
            raise RegistryError(
                f"the server requires {' and '.join(missing_packages)}; run "
                "pip install 'segment-caption-anything[serve]'"
            )

    def load_captioner(self) -> Captioner:
        """Set the random seed and load the captioner; `sca.load_captioner` lists the errors."""
        import torch

        from sca.inference.factory import load_captioner

        torch.manual_seed(self.seed)
        options: dict[str, Any] = {"precision": self.precision} if self.precision else {}
        return load_captioner(
            self.model,
            self.device,
            trust_remote_code=self.trust_remote_code,
            allow_external=self.allow_external,
            **options,
        )

    def create_app(self, captioner: Captioner | None = None) -> FastAPI:
        """Create the application.

        Args:
            captioner: Loaded captioner; None to load `model`.

        Returns:
            The FastAPI application.
        """
        from sca.serve.app import create_app
        from sca.serve.limits import ServerLimits
        from sca.serve.scheduler import RequestScheduler
        from sca.serve.task_images import TaskImageReader

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
            scheduler,
            self.model,
            limits,
            self.allowed_origins,
            self.allowed_hosts,
            self.api_keys,
            self.root_path,
            self.zoom,
            TaskImageReader(self.label_studio_url, self.image_urls, self.label_studio_key, self.max_body_bytes)
            if self.label_studio
            else None,
        )
