"""MPDF deliberation."""
