"""The embedded tiny LLaVA: its shape, its tokenizer, the scene text it learned from."""
