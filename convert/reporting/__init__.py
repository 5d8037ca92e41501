"""Reports: what conversions cost and keep, drawn from their manifests alone."""
