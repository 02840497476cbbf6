"""The computation: a model as steps under secret sharing, with settings, encodings and predicted costs."""
