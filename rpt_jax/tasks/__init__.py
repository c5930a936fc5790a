"""What the tasks of the training loop differ in: prompts, reward and evaluation."""
