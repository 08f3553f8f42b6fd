"""Text to tokens to image: a causal language model predicts the tokens of a tokenizer scale by scale."""
