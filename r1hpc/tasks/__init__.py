"""Ask questions with verifiable answers and score what a policy writes. No torch.

Text that a policy wrote is never evaluated: it is parsed within bounds, in a process that can be killed.
"""
