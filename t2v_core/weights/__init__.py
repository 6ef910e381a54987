"""Weights: found, understood, named as our modules are, loaded strictly. Only this package knows checkpoint layouts."""

from t2v_core.weights.checkpoint import Checkpoint, NetworkName
from t2v_core.weights.convert import check_new, convert
from t2v_core.weights.find import DEMO, open_checkpoint, public_name
from t2v_core.weights.networks import load_autoencoder, load_text_encoder, load_unet

__all__ = [
    "DEMO",
    "Checkpoint",
    "NetworkName",
    "check_new",
    "convert",
    "load_autoencoder",
    "load_text_encoder",
    "load_unet",
    "open_checkpoint",
    "public_name",
]
