"""Run reasoning training on Slurm clusters without losing work to preemption.

    from r1hpc import Run, submit

    done = submit("jobs/smoke.yaml", nodes=2)
    Run(done.run.path).wait()

`attempt()` is the run of a training script (docs/own-script.md). The other names are in r1hpc.api
(docs/api.md). They load on first use: `import r1hpc` itself loads nothing. `r1hpc.submit` and
`r1hpc.attempt` are modules that can be called like the functions.
"""

TYPE_CHECKING = False  # like typing's, without the time to import typing
if TYPE_CHECKING:
    from r1hpc.api import Chain, ChainSubmission, Run, Submission, submit
    from r1hpc.base.package import __version__
    from r1hpc.client.run import attempt

__all__ = ["Chain", "ChainSubmission", "Run", "Submission", "__version__", "attempt", "submit"]


def __getattr__(name: str) -> object:
    if name in ("attempt", "submit"):
        import importlib

        return importlib.import_module(f"r1hpc.{name}")
    if name == "__version__":
        from r1hpc.base.package import __version__

        return __version__
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from r1hpc import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
