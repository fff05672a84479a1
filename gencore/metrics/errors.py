"""What keeps a measure from being taken."""


class MissingWeightsError(ValueError):
    """The weights of a feature extractor, or what reads them, are missing; the message says where to get them."""
