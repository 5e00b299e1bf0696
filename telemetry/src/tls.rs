//! How a collector that speaks TLS is dialled, by the standard variables: names of PEM files, read once, at the start.

use opentelemetry_otlp::tonic_types::transport::{Certificate, ClientTlsConfig, Identity};

use crate::Error;

/// Authorities that the collector's certificate is checked against, in place of the machine's own. For spans, or for all.
const AUTHORITIES: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "OTEL_EXPORTER_OTLP_CERTIFICATE"];
/// What is shown to the collector.
const CERTIFICATE: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE", "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE"];
/// Its private key.
const KEY: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY", "OTEL_EXPORTER_OTLP_CLIENT_KEY"];

/// What the variables say.
pub(crate) fn of(set: impl Fn(&str) -> Option<String>) -> Result<ClientTlsConfig, Error> {
    let file = |names: [&'static str; 2]| {
        let named = names.into_iter().find_map(|variable| Some((variable, set(variable)?)));
        let read = named.map(|(variable, path)| std::fs::read(&path).map_err(|source| Error::File { variable, path, source }));
        read.transpose()
    };
    let config = match file(AUTHORITIES)? {
        Some(authorities) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authorities)),
        None => ClientTlsConfig::new().with_enabled_roots(),
    };
    match (file(CERTIFICATE)?, file(KEY)?) {
        (Some(certificate), Some(key)) => Ok(config.identity(Identity::from_pem(certificate, key))),
        (None, None) => Ok(config),
        (Some(_), None) => Err(Error::Incomplete { missing: KEY[1] }),
        (None, Some(_)) => Err(Error::Incomplete { missing: CERTIFICATE[1] }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_there_and_a_certificate_without_its_key_are_errors_that_name_the_variable() {
        let told = |variable: &str, value: &str| {
            let error = of(|name| (name == variable).then(|| value.to_owned())).unwrap_err();
            error.to_string()
        };
        assert_eq!(told(AUTHORITIES[0], "/none/ca.crt"), "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE: read /none/ca.crt");
        assert!(told(CERTIFICATE[1], "Cargo.toml").starts_with("OTEL_EXPORTER_OTLP_CLIENT_KEY: is missing"));
        assert!(told(KEY[0], "Cargo.toml").starts_with("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE: is missing"));
    }
}
