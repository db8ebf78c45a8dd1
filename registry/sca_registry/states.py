"""The state of a part: ok, unchecked (a plugin that was not used yet), broken, or needs an extra."""

from __future__ import annotations

from collections.abc import Mapping

from sca_registry.plugins import Offer, extra_installed, source_fingerprint
from sca_registry.verdicts import Verdict, read_verdicts, write_verdict

BREAKS = "breaks promises"  # what a verdict says of a part that builds, but does not do what its kind promises


def read_state(kind: str, offer: Offer, verdicts: Mapping[str, Verdict]) -> Verdict:
    """What a listing shows without importing anything: metadata first, then how the last use ended."""
    if offer.fault:
        return Verdict("broken", offer.fault)
    needs = needs_extra(offer)
    if needs and extra_installed(offer.origin.name, offer.card.extra) is False:
        return needs
    untried = Verdict("ok" if offer.builtin or offer.registered else "unchecked")
    return verdicts.get(_key(kind, offer), untried)


def keep_state(kind: str, offer: Offer, verdict: Verdict, judged: bool = False) -> None:
    """Keeps how a use ended, unless a listing shows it already. That it imports does not clear what failed to build;
    and what broke a promise stays broken until it is `judged` again, however well it builds.
    """
    verdicts = read_verdicts()
    known = verdicts.get(_key(kind, offer))
    stays = known is not None and (
        (known.built and verdict == Verdict("ok"))
        or (known.reason.startswith(BREAKS) and verdict.state == "ok" and not judged)
    )
    if read_state(kind, offer, verdicts)[:2] != verdict[:2] and not stays:
        write_verdict(_key(kind, offer), verdict, keep=bool(offer.origin.fingerprint))


def blame(offer: Offer, error: BaseException, built: bool) -> Verdict:
    """What an import or a construction that ended in `error` says of the part.

    An import error means a missing extra if the card names one, it is not known to be installed, and the module that
    was not found is not the part's own.
    """
    needs, top = needs_extra(offer), offer.card.factory.partition(":")[0].partition(".")[0]
    elsewhere = isinstance(error, ImportError) and (error.name or "").partition(".")[0] != top
    if needs and elsewhere and not extra_installed(offer.origin.name, offer.card.extra):
        return needs._replace(built=built)
    return Verdict("broken", _one_line(error), built)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is the machine's rather than the part's: Python's own, CUDA's, or torch's on the CPU."""
    return isinstance(error, MemoryError) or any(
        words in str(error).lower() for words in ("out of memory", "can't allocate memory")
    )


def needs_extra(offer: Offer) -> Verdict | None:
    """The state of a part whose extra is not installed, with the command that installs it; None if it needs none."""
    if not offer.card.extra:
        return None
    return Verdict(f"needs extra: {offer.card.extra}", f"pip install '{offer.origin.name}[{offer.card.extra}]'")


def _key(kind: str, offer: Offer) -> str:
    """Return what a verdict is about: a name of one installation, with its source files as they are."""
    origin = offer.origin
    source = source_fingerprint(offer.card.factory.partition(":")[0].partition(".")[0])
    return f"{origin.name} {origin.version} {origin.fingerprint} {source} {kind}:{offer.card.name}"


def _one_line(error: BaseException) -> str:
    """An exception's type and text, short enough for a listing."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].removesuffix(":")
