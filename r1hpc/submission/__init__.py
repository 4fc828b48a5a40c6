"""From an order to jobs: one run, or a chain of stages tied by dependencies.

order              what was asked for
submit             a run or a chain: which, and hand on
submit_run         a run from order to job: plan, budget, start
plan_run           check, ask the cluster, plan, script; with run_estimate: what it will cost
budget_check       whether the budget allows it
start_run          freeze into the run folder, hand to Slurm or to a supervisor here
run_text           what is printed of it

submit_chain       a chain from order to jobs; it may be submitted again
chain_file         its stages, what each needs, the references between them
chain_folder       its paths under the run root, and its lock
chain_steps        what each stage needs next, and doing it by plan_run and start_run
chain_state        what it is doing; cancel_chain ends it
chain_supervisor   the stages one after the other on this machine
next_job           the job in which a run goes on after an attempt; jobs that wait for it follow
chain_estimate     its cost before it is submitted; job_estimate that of a job; chain_text: what is printed
"""
