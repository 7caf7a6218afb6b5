# SPDX-License-Identifier: Apache-2.0
"""Errors: each says what was asked, what was found, where, and what to do."""


class JaxCompressError(ValueError):
    """Base class of every error that jaxcompress raises on purpose."""


class SiteError(JaxCompressError):
    """An operation of the model cannot be handled as asked."""


class RecipeError(JaxCompressError):
    """A recipe or pattern is wrong: unknown name, a rule that matches nothing, a conflict."""


class FormatError(JaxCompressError):
    """A number format is unknown, or an array does not fit it."""


class ArtifactError(JaxCompressError):
    """A file or directory is missing, damaged, refused, or cannot be written."""
