"""InternViT, the decoder, and InternVL-Chat made of both."""
