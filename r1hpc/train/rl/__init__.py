"""Run a step of reinforcement learning: collect, reward, update."""
