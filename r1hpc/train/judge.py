"""What stages generate and evaluate share: a model that only samples, and the judge of what it says."""

from collections.abc import Iterator
from contextlib import contextmanager

from r1hpc.plan.model import load_model_config
from r1hpc.tasks.registry import make_task
from r1hpc.tasks.rewards import Scorer
from r1hpc.tasks.task import Task, check_num_held_out
from r1hpc.tasks.tokenizer import load_tokenizer, special_ids
from r1hpc.train import loop
from r1hpc.train.evaluate import Evaluator
from r1hpc.train.loop import Job
from r1hpc.train.model import build_model, cast_parameters
from r1hpc.train.policy import DTYPES, build_rollout_engine
from r1hpc.train.prompts import Prompts


@contextmanager
def judge(job: Job) -> Iterator[tuple[Task, Evaluator]]:
    """The task and an evaluator over the model of `model.path`, whole on every rank."""
    config = job.config
    loop.check_device(job)
    tokenizer = load_tokenizer(config.model)
    ids = special_ids(tokenizer, config.model)
    task = make_task(config.task)
    if config.stage == "evaluate":
        check_num_held_out(task, config.evaluate.num_items)
    hf_config = load_model_config(config, tokenizer.get_vocab_size())
    job.watchdog.beat("loading the model")
    network = build_model(config.model, hf_config, config.train.seed)
    cast_parameters(network, DTYPES[config.train.precision])
    network.eval().to(job.group.device)
    engine = build_rollout_engine(job, hf_config, ids, zero_stage=0)
    engine.sync_weights(network)
    longest = config.rollout.max_completion_length
    flops = loop.model_flops_per_token(hf_config, longest)
    with Scorer(config.reward, task, max_completion_length=longest, flops_per_token=flops) as scorer:
        prompts = Prompts(tokenizer, config.rollout.max_prompt_length)
        yield task, Evaluator(config, task, prompts, engine, scorer)
