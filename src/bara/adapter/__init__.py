"""Posteriors on PEFT's LoRA: attaching, the forward pass, the ELBO."""
