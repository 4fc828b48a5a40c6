"""What of the caller's environment reaches a job."""

from pathlib import Path

from r1hpc.attempt.detached import without_foreign_ranks
from r1hpc.config.secrets import exported

SECRETS = {
    "HF_TOKEN": "1",
    "WANDB_API_KEY": "1",
    "AWS_SECRET_ACCESS_KEY": "1",
    "NCCL_PASSWORD": "1",
    "VLLM_API_KEY": "1",
    "R1HPC_TOKEN": "1",
    "GITHUB_TOKEN": "1",
    "OMP_SECRET": "1",
    "SSH_AUTH_SOCK": "1",
    "HTTPS_PROXY": "http://user:word@proxy:3128",
    "http_proxy": "user:word@proxy:3128",
    "WANDB_BASE_URL": "https://user:word@wandb.example.org",
    "R1HPC_MIRROR": "https://word@mirror.example.org",
    "NCCL_NOTE": "ghp_0123456789abcdef0123456789abcdef0123",
}
FOREIGN = {
    "SLURM_JOB_ID": "1",
    "SLURM_NTASKS": "1",
    "SBATCH_QOS": "1",
    "RANK": "1",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "1",
    "MASTER_PORT": "1",
    "CUDA_VISIBLE_DEVICES": "0",
    "R1HPC_ATTEMPT": "1",
    "R1HPC_LOCAL_RANK": "1",
    "SUBMITIT_EXECUTOR": "slurm",
}


def test_a_job_gets_what_it_needs_and_no_more() -> None:
    needed = {
        "HOME": "/h",
        "PATH": "/bin",
        "NCCL_DEBUG": "INFO",
        "VLLM_ATTENTION_BACKEND": "FLASH_ATTN",
        "HF_HOME": "/c",
        "https_proxy": "http://proxy:3128",
        "SSL_CERT_FILE": "/etc/ssl/ca.pem",
        "TOKENIZERS_PARALLELISM": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "FLASH_ATTENTION_DETERMINISTIC": "1",
        "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
    }
    needed |= {"BASH_FUNC_module%%": "() { :; }", "SLURM_CONF": "/etc/slurm.conf"}
    # The login node's device, which is not the job's.
    elsewhere = {"MY_APP": "1", "DS_ACCELERATOR": "cpu"}
    assert exported({**needed, **SECRETS, **FOREIGN, **elsewhere}) == needed


def test_relative_search_paths_become_absolute() -> None:
    here = Path.cwd()
    assert exported({"PYTHONPATH": ".:src:/abs"})["PYTHONPATH"] == f"{here}:{here}/src:/abs"


def test_a_local_run_does_not_inherit_a_rank() -> None:
    kept = without_foreign_ranks({**FOREIGN, "HOME": "/h", "SLURM_CONF": "/c", "MY_APP": "1"})
    assert kept == {"HOME": "/h", "SLURM_CONF": "/c", "MY_APP": "1", "CUDA_VISIBLE_DEVICES": "0"}
