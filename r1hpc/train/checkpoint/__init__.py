"""Save and load the state of DeepSpeed, in the background where asked."""
