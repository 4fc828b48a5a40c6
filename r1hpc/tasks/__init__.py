"""Questions with verifiable answers, their verifiers and rewards, and the tokenizer. No torch.

Text that a policy wrote is never evaluated: it is parsed within bounds, in a process that can be killed.
"""
