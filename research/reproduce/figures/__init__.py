"""The paper's figures again: gradients of sampled weights, CKA over a run, memory over a run."""
