"""Prints what libraries made of the variables about the Hub."""

import json

import datasets.config
import transformers.dynamic_module_utils
import transformers.utils
from huggingface_hub import constants, get_token, hf_api


def main():
    shown = {
        "endpoint": constants.ENDPOINT,
        "endpoint of the functions": hf_api.api.endpoint,
        "endpoint of datasets": datasets.config.HF_ENDPOINT,
        "cache": constants.HF_HUB_CACHE,
        "modules": transformers.utils.HF_MODULES_CACHE,
        "modules where they are loaded": transformers.dynamic_module_utils.HF_MODULES_CACHE,
        "data": datasets.config.HF_DATASETS_CACHE,
        "token": get_token(),
    }
    print(json.dumps({name: value and str(value) for name, value in shown.items()}))
