"""How good a trained adapter is, at every site, beside training alone and on pooled scans."""
