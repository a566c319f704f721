"""`python -m lora_kernels finetune`: LoRA fine-tuning of a language model with transformers and PEFT."""
