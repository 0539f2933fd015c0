"""Names of files in a checkpoint folder that several modules read or write."""

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
BUNDLE_MANIFEST_FILE = "manifest.json"
CONVERSION_FILE = "conversion.json"

CALIBRATION_FILE = "calibration.safetensors"
"""The calibration of the checkpoint; ``service.diagnostics.calibration`` reads and writes it."""
