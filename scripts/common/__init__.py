"""What several scripts share: standard errors, files of results, pictures and tables."""
