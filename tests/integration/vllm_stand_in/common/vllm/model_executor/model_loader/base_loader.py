from abc import ABC, abstractmethod


class BaseModelLoader(ABC):
    def __init__(self, load_config):
        self.load_config = load_config

    @abstractmethod
    def load_weights(self, model, model_config): ...

    def load_model(self, vllm_config, model_config, prefix=""):
        model = vllm_config.make_model()
        self.load_weights(model, model_config)
        return model.eval()
