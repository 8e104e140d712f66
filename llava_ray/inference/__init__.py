"""What answers: engines, prompts, sampling and the scheduler of many answers at a time."""
