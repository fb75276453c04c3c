//! Certificates.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
};

/// An authority, whose certificate is in `ca.crt`.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new(dir: &Path) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "test authority");
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(dir.join("ca.crt"), certificate.pem()).unwrap();
        Self { issuer: Issuer::new(params, key) }
    }

    /// Writes FILE.crt and FILE.key.
    pub fn sign(&self, dir: &Path, file: &str, name: &str) {
        self.sign_for(dir, file, name, &["relay.test"]);
    }

    pub fn sign_for(&self, dir: &Path, file: &str, name: &str, names: &[&str]) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = DistinguishedName::new();
        // An empty name: only an organization.
        let kind = if name.is_empty() { DnType::OrganizationName } else { DnType::CommonName };
        params.distinguished_name.push(kind, if name.is_empty() { "nobody" } else { name });
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(dir.join(format!("{file}.crt")), certificate.pem()).unwrap();
        std::fs::write(dir.join(format!("{file}.key")), key.serialize_pem()).unwrap();
    }
}
