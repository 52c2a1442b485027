"""Pretrained models: all layers alike, so that their configs can say the new sizes."""
