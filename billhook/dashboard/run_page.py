"""x"""
from billhook.dashboard.layout import page_html
def run_page(listing, request):
    """x"""
    return page_html("run", listing.store, "")
def parts(listing, run, fresh):
    """x"""
    return {}
