"""Run reasoning training on Slurm clusters without losing work to preemption.

    from r1hpc import Run, submit

    done = submit("jobs/smoke.yaml", nodes=2)
    Run(done.run.path).wait()

The public names are in r1hpc.api and load on first use: `import r1hpc` itself loads nothing. `r1hpc.submit`
is the command's module, and can be called like the function. See docs/api.md.
"""

TYPE_CHECKING = False  # like typing's, without the time to import typing
if TYPE_CHECKING:
    from r1hpc.api import Chain, ChainSubmission, Run, Submission, submit
    from r1hpc.base.version import __version__

__all__ = ["Chain", "ChainSubmission", "Run", "Submission", "__version__", "submit"]


def __getattr__(name: str) -> object:
    if name == "submit":
        import importlib

        return importlib.import_module("r1hpc.submit")
    if name == "__version__":
        from r1hpc.base import version

        return version.__version__
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from r1hpc import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
