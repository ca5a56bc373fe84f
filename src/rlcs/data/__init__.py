"""From a source of rows to problems and demonstrations, with bad rows set aside and named."""
