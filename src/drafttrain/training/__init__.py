"""Training: the only room that imports lightning and deepspeed."""
